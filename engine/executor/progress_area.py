"""The ranks' progress as others see it: memory of one host with a slot for each rank (engine/progress.py).

Like the plan ring it is an anonymous memory file that the hub makes and hands to its ranks over their Unix sockets: it
outlives every rank, and reading it asks nobody.
"""

import ctypes
import mmap
import os
import time
from collections.abc import Collection

import msgspec

from engine.progress import NUM_WORDS, SLOT_BYTES, RankSample, sample_of, start_ticks

SlotMemory = ctypes.Array[ctypes.c_char]
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_samples = msgspec.msgpack.Decoder(list[RankSample])
_encoder = msgspec.msgpack.Encoder()


class ProgressArea:
    """The reader's side, for ``ranks``, whose numbers are those of the slots."""

    def __init__(self, ranks: Collection[int]) -> None:
        self._ranks = sorted(ranks)
        num_bytes = SLOT_BYTES * (self._ranks[-1] + 1)
        self.fd = os.memfd_create("remuda-progress", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, num_bytes)
        self._memory = mmap.mmap(self.fd, num_bytes)
        self._words = memoryview(self._memory).cast("Q")
        self._last: dict[int, RankSample] = {}

    def slot(self, rank: int) -> SlotMemory:
        """For a rank that is a thread of this process."""
        return _slot(self._memory, rank)

    def read(self) -> list[RankSample]:
        """Where each rank is. What the kernel says of its process is looked up only where it has not moved since the
        last call: else it lives."""
        if self.fd < 0:
            return []
        now_ns = time.monotonic_ns()
        samples = []
        for rank in self._ranks:
            words = self._words[rank * NUM_WORDS : (rank + 1) * NUM_WORDS]
            sample = sample_of(rank, words, now_ns)
            last = self._last.get(rank)
            if last is not None and last.signature == sample.signature and words[3]:
                state, cpu_s = _process(*words[3:7])
                sample = msgspec.structs.replace(sample, process_state=state, cpu_s=cpu_s)
            self._last[rank] = sample
            samples.append(sample)
        return samples

    def close(self) -> None:
        """May be called twice. Ranks that still write do no harm."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def open_slot(fd: int, rank: int) -> SlotMemory:
    """A rank's own slot in the memory that its hub handed over; takes ``fd`` over."""
    memory = mmap.mmap(fd, os.fstat(fd).st_size)
    os.close(fd)
    return _slot(memory, rank)


def private_slot() -> SlotMemory:
    """For a rank that nobody can look at."""
    return ctypes.create_string_buffer(SLOT_BYTES)


def _slot(memory: mmap.mmap, rank: int) -> SlotMemory:
    return (ctypes.c_char * SLOT_BYTES).from_buffer(memory, rank * SLOT_BYTES)


def _process(pid: int, thread: int, started: int, namespace: int) -> tuple[str, float]:
    """The thread's state and the process's processor seconds; "X" where it has ended, "" where process numbers mean
    other processes here."""
    if os.stat("/proc/self/ns/pid").st_ino != namespace:
        return "", 0.0
    try:
        if start_ticks(pid) != started:
            return "X", 0.0
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        with open(f"/proc/{pid}/task/{thread}/stat", "rb") as file:
            state = file.read().rpartition(b")")[2].split()[0].decode()
    except (FileNotFoundError, ProcessLookupError):
        return "X", 0.0
    return state, (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def encode_samples(samples: list[RankSample]) -> bytes:
    return _encoder.encode(samples)


def decode_samples(data: bytes) -> list[RankSample]:
    """Raises msgspec.DecodeError."""
    return _samples.decode(data)
