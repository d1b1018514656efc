"""SHA-256 of parts of a file, read by offset. Torch-free; the hash and the reading let other threads run."""

import hashlib
import os
from pathlib import Path

_BUFFER_BYTES = 2**20


class RangeHasher:
    """Hashes ranges of one file, which is open from ``__init__`` to ``close``. For one thread.

    Raises OSError where the file cannot be opened or read.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))

    def close(self) -> None:
        os.close(self._descriptor)

    def sha256(self, begin: int, end: int) -> str:
        """Hexadecimal hash of the bytes [begin, end), of fewer where the file ends before."""
        state = hashlib.sha256()
        while begin < end:
            num_bytes = os.preadv(self._descriptor, [self._buffer[: end - begin]], begin)
            if num_bytes == 0:
                break
            state.update(self._buffer[:num_bytes])
            begin += num_bytes
        return state.hexdigest()


def sha256_of(path: Path, begin: int, end: int) -> str:
    """As RangeHasher.sha256, opening the file for one range."""
    hasher = RangeHasher(path)
    try:
        return hasher.sha256(begin, end)
    finally:
        hasher.close()
