"""A ring of shared memory with one writer and many readers, for the plans that all ranks of one host read.

It lives in an anonymous memory file (memfd) whose descriptor is handed over a Unix socket: it never has a name, so
nothing is left behind however its users die, and the size of /dev/shm does not bound it. Positions and lengths travel
in frames on the sockets; a frame's arrival orders the memory before it, and a socket's end tells of a peer's death,
which shared memory alone cannot.
"""

import mmap
import os


class PlanRing:
    """The writer's side. Positions count bytes from the beginning of time; a message never wraps."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.fd = os.memfd_create("remuda-plans", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, num_bytes)
        self._memory = mmap.mmap(self.fd, num_bytes)
        self._written = 0

    def write(self, data: bytes, consumed: int) -> int | None:
        """The position of ``data`` in the ring, or None where it does not fit.

        ``consumed``: the slowest reader has read everything before this position.
        """
        offset = self._written % self.num_bytes
        skipped = self.num_bytes - offset if offset + len(data) > self.num_bytes else 0
        position = self._written + skipped
        if len(data) > self.num_bytes or position + len(data) - consumed > self.num_bytes:
            return None
        start = position % self.num_bytes
        self._memory[start : start + len(data)] = data
        self._written = position + len(data)
        return position

    def close(self) -> None:
        if not self._memory.closed:
            self._memory.close()
            os.close(self.fd)


class PlanRingReader:
    """A reader's side, over the writer's descriptor, which it takes over."""

    def __init__(self, fd: int) -> None:
        self._num_bytes = os.fstat(fd).st_size
        self._memory = mmap.mmap(fd, self._num_bytes, access=mmap.ACCESS_READ)
        os.close(fd)
        self.consumed = 0

    def read(self, position: int, num_bytes: int) -> bytes:
        start = position % self._num_bytes
        data = self._memory[start : start + num_bytes]
        self.consumed = position + num_bytes
        return data

    def close(self) -> None:
        self._memory.close()
