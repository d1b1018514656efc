"""Collectives between CPU ranks of one host, through shared memory (engine/kernels/native/collectives.cpp).

The memory is an anonymous file of rank 0 that the others open through /proc: nothing is left behind however ranks end.
"""

import ctypes
import datetime
import mmap
import os
import secrets
from collections.abc import Callable
from typing import Any, Self

import torch
import torch.distributed as dist

from engine.errors import RankFailure
from engine.kernels.native_library import native_library

_BUFFER_BYTES = 4 * 1024 * 1024
"""Of each of a rank's two; only what is used becomes resident."""
_SPLIT_BYTES = 64 * 1024
"""Larger sums are divided among the ranks; below, each adds up everything, which takes one exchange instead of two."""
_NUM_SPINS = 2000
"""About 10 µs: longer than a peer that is nearly done, shorter than a sleep and a wake-up cost."""
_TOKEN_BYTES = 32
_LATE, _GONE = -1000, -2000
_ELEMENT_BYTES = {torch.float32: 4, torch.bfloat16: 2}


class _Group(ctypes.Structure):
    """struct Group of collectives.cpp."""

    _fields_ = (
        ("area", ctypes.c_void_p),
        ("buffer_bytes", ctypes.c_int64),
        ("rank", ctypes.c_int32),
        ("size", ctypes.c_int32),
        ("num_spins", ctypes.c_int32),
        ("pidfds", ctypes.c_void_p),
        ("timeout_ns", ctypes.c_int64),
        ("done", ctypes.c_uint32),
    )


class SharedMemoryCollectives:
    """An axis whose ranks all run on this host. All ranks add in the order of ranks, so their sums are bitwise equal.

    A dead peer is noticed within 50 ms, a silent one after the timeout; both are named. The group is of no use then.
    """

    def __init__(self, library: ctypes.CDLL, memory: mmap.mmap, rank: int, pids: list[int], timeout_s: float) -> None:
        self._library = library
        self._memory = memory
        self._timeout_s = timeout_s
        size = len(pids)
        self._pidfds = (ctypes.c_int32 * size)(*(-1 if i == rank else _pidfd(pid) for i, pid in enumerate(pids)))
        self._group = _Group(
            area=ctypes.addressof(ctypes.c_char.from_buffer(memory, _TOKEN_BYTES * 2)),
            buffer_bytes=_BUFFER_BYTES,
            rank=rank,
            size=size,
            num_spins=_NUM_SPINS if size <= len(os.sched_getaffinity(0)) else 0,
            pidfds=ctypes.addressof(self._pidfds),
            timeout_ns=int(timeout_s * 1e9),
            done=0,
        )
        self._handle = ctypes.byref(self._group)
        self.size, self.rank = size, rank

    @classmethod
    def join(cls, store: dist.Store, rank: int, size: int, address: str, timeout_s: float) -> Self | None:
        """Meet the other ranks of the axis through ``store``.

        Args:
            address: of this rank's host, as other hosts reach it.

        None, on all ranks alike, where they are on several hosts, cannot share memory, or lack the native library.
        Raises RuntimeError where they do not meet within ``timeout_s``.
        """
        store = dist.PrefixStore("shared-memory", store)
        library = native_library()
        can_share = library is not None and size <= library.remuda_max_ranks()
        store.set(f"address/{rank}", f"{address} {os.getpid()}" if can_share else "")
        answers = [answer.split() for answer in _all_of(store, "address", size, timeout_s)]
        if library is None or any(not answer for answer in answers) or len({answer[0] for answer in answers}) > 1:
            return None
        memory = _share_memory(store, rank, size, _TOKEN_BYTES * 2 + _area_bytes(library, size), timeout_s)
        if memory is None:
            return None
        return cls(library, memory, rank, [int(answer[1]) for answer in answers], timeout_s)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.contiguous()
        element_bytes = _ELEMENT_BYTES[tensor.dtype]
        self._call(
            self._library.remuda_all_reduce,
            "all-reduce",
            ctypes.c_void_p(tensor.data_ptr()),
            ctypes.c_int64(tensor.numel()),
            element_bytes,
            ctypes.c_int64(_SPLIT_BYTES),
        )
        return tensor

    def gather_last_dim(self, tensor: torch.Tensor) -> torch.Tensor | None:
        tensor = tensor.contiguous()
        width = tensor.shape[-1]
        row_bytes = width * tensor.element_size()
        assert row_bytes <= _BUFFER_BYTES, f"a row of {row_bytes} bytes does not fit into {_BUFFER_BYTES}"
        output = tensor.new_empty(*tensor.shape[:-1], width * self.size) if self.rank == 0 else None
        self._call(
            self._library.remuda_gather_rows,
            "gather",
            ctypes.c_void_p(tensor.data_ptr()),
            ctypes.c_int64(tensor.numel() // width),
            ctypes.c_int64(row_bytes),
            ctypes.c_void_p(None if output is None else output.data_ptr()),
        )
        return output

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        values = tensor.contiguous()
        num_bytes = ctypes.c_int64(values.numel() * values.element_size())
        self._call(self._library.remuda_broadcast, "broadcast", ctypes.c_void_p(values.data_ptr()), num_bytes)
        return tensor if values is tensor else tensor.copy_(values)

    def _call(self, function: Callable[..., int], operation: str, *arguments: Any) -> None:
        result = function(self._handle, *arguments)
        if result == 0:
            return
        number = self._group.done
        if result <= _GONE:
            raise RankFailure(f"{operation} {number} failed: rank {_GONE - result} of the axis has died")
        raise RankFailure(
            f"{operation} {number} failed: rank {_LATE - result} of the axis did not reach it within "
            f"{self._timeout_s:g} s"
        )


def _area_bytes(library: ctypes.CDLL, size: int) -> int:
    function = library.remuda_area_bytes
    function.restype = ctypes.c_int64
    return int(function(size, ctypes.c_int64(_BUFFER_BYTES)))


def _all_of(store: dist.Store, name: str, size: int, timeout_s: float) -> list[str]:
    keys = [f"{name}/{rank}" for rank in range(size)]
    store.wait(keys, datetime.timedelta(seconds=timeout_s))
    return [store.get(key).decode() for key in keys]


def _share_memory(store: dist.Store, rank: int, size: int, num_bytes: int, timeout_s: float) -> mmap.mmap | None:
    """Rank 0's anonymous file, mapped by all; None on all where one of them cannot."""
    descriptor = -1
    if rank == 0:
        descriptor = os.memfd_create("remuda-collectives", os.MFD_CLOEXEC)
        os.truncate(descriptor, num_bytes)
        memory: mmap.mmap | None = mmap.mmap(descriptor, num_bytes)
        assert memory is not None
        token = secrets.token_hex(_TOKEN_BYTES // 2)
        memory[:_TOKEN_BYTES] = token.encode()
        store.set("memory", f"/proc/{os.getpid()}/fd/{descriptor} {token}")
    else:
        path, token = store.get("memory").decode().split()
        memory = _map(path, num_bytes, token.encode())
    store.set(f"mapped/{rank}", "no" if memory is None else "yes")
    is_mapped_by_all = "no" not in _all_of(store, "mapped", size, timeout_s)
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
    return memory if memory[:_TOKEN_BYTES] == token else None


def _pidfd(pid: int) -> int:
    """Becomes readable when the process ends; -1 where the kernel has none."""
    try:
        return os.pidfd_open(pid)
    except OSError:
        return -1
