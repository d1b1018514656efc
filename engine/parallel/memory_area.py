"""Memory that ranks of one host share: an anonymous file of one of them that the others open through /proc, so that
nothing is left behind however ranks end."""

import datetime
import mmap
import os
import secrets
import threading

import torch.distributed as dist

TOKEN_BYTES = 32
HEADER_BYTES = 2 * TOKEN_BYTES
"""At the beginning of the memory: by it the others see that it is the right one."""
NUM_SPINS = 2000
"""About 10 µs: longer than a peer that is nearly done, shorter than a sleep and a wake-up cost."""


def num_spins(num_ranks: int) -> int:
    """How often to look before going to sleep: never where ranks outnumber the cores."""
    return NUM_SPINS if num_ranks <= len(os.sched_getaffinity(0)) else 0


class SharedArea:
    """``pidfds`` by rank become readable when that rank's process ends, and all of them after ``abort``; -1 for this
    rank. Whoever waits in the area looks at them (engine/kernels/native/turn.h)."""

    def __init__(self, memory: mmap.mmap, pidfds: list[int]) -> None:
        self.memory = memory
        self.pidfds = pidfds
        self._lock = threading.Lock()
        self._is_closed = False

    def abort(self) -> None:
        """From any thread: whoever waits for another rank sees it gone within 50 ms. Under the same numbers, so that
        it also holds for a wait that has begun."""
        with self._lock:
            if self._is_closed:
                return
            readable = os.eventfd(1, os.EFD_CLOEXEC)
            for pidfd in self.pidfds:
                if pidfd >= 0:
                    os.dup2(readable, pidfd, inheritable=False)
            os.close(readable)

    def close(self) -> None:
        """Nobody waits any more. The memory is unmapped with the last object that points into it."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                for pidfd in self.pidfds:
                    if pidfd >= 0:
                        os.close(pidfd)


def share_area(
    store: dist.Store, rank: int, size: int, address: str, num_bytes: int | None, timeout_s: float
) -> SharedArea | None:
    """Meet the other ranks through ``store`` and map ``num_bytes`` of memory with them, zeros, behind HEADER_BYTES.

    Args:
        address: of this rank's host, as other hosts reach it.
        num_bytes: None where this rank cannot share.

    None, on all ranks alike, where they are on several hosts or one of them cannot share memory. Raises RuntimeError
    where they do not meet within ``timeout_s``.
    """
    store.set(f"address/{rank}", "" if num_bytes is None else f"{address} {os.getpid()}")
    answers = [answer.split() for answer in all_of(store, "address", size, timeout_s)]
    if num_bytes is None or any(not answer for answer in answers) or len({answer[0] for answer in answers}) > 1:
        return None
    memory = _share_memory(store, rank, size, HEADER_BYTES + num_bytes, timeout_s)
    if memory is None:
        return None
    return SharedArea(memory, [-1 if i == rank else _pidfd(int(answer[1])) for i, answer in enumerate(answers)])


def all_of(store: dist.Store, name: str, size: int, timeout_s: float) -> list[str]:
    """What ranks 0 to ``size`` − 1 have written under ``name``. Raises RuntimeError where one has not in time."""
    keys = [f"{name}/{rank}" for rank in range(size)]
    store.wait(keys, datetime.timedelta(seconds=timeout_s))
    return [store.get(key).decode() for key in keys]


def _share_memory(store: dist.Store, rank: int, size: int, num_bytes: int, timeout_s: float) -> mmap.mmap | None:
    """Rank 0's anonymous file, mapped by all; None on all where one of them cannot."""
    descriptor = -1
    if rank == 0:
        descriptor = os.memfd_create("remuda-ranks", os.MFD_CLOEXEC)
        os.truncate(descriptor, num_bytes)
        memory: mmap.mmap | None = mmap.mmap(descriptor, num_bytes)
        assert memory is not None
        token = secrets.token_hex(TOKEN_BYTES // 2)
        memory[:TOKEN_BYTES] = token.encode()
        store.set("memory", f"/proc/{os.getpid()}/fd/{descriptor} {token}")
    else:
        path, token = store.get("memory").decode().split()
        memory = _map(path, num_bytes, token.encode())
    store.set(f"mapped/{rank}", "no" if memory is None else "yes")
    is_mapped_by_all = "no" not in all_of(store, "mapped", size, timeout_s)
    if descriptor >= 0:
        os.close(descriptor)
    return memory if is_mapped_by_all else None


def _map(path: str, num_bytes: int, token: bytes) -> mmap.mmap | None:
    """None where the file cannot be opened, or is another one (process numbers may mean other processes here)."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if os.fstat(descriptor).st_size != num_bytes:
            return None
        memory = mmap.mmap(descriptor, num_bytes)
    finally:
        os.close(descriptor)
    return memory if memory[:TOKEN_BYTES] == token else None


def _pidfd(pid: int) -> int:
    """Becomes readable when the process ends; where the kernel has none, or the process is gone, never or at once."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return os.eventfd(1, os.EFD_CLOEXEC)
    except OSError:
        return os.eventfd(0, os.EFD_CLOEXEC)
