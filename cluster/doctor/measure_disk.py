"""The checkpoint on this host: what it is, and how fast it comes from the disk."""

import hashlib
import mmap
import os
import time
from pathlib import Path

from cluster.doctor.facts import Checkpoint
from engine.weights.manifest import manifest_path

_BLOCK_BYTES = 4 * 2**20
_MAX_SECONDS = 1.0
_MAX_BYTES = 1024 * 2**20


def checkpoint_facts(path: Path) -> Checkpoint:
    """Of a directory or a GGUF file. Reads no weights."""
    files = _files(path)
    digest = hashlib.blake2b(digest_size=8)
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
    if (manifest := manifest_path(path)).is_file():
        digest.update(manifest.read_bytes())
    return Checkpoint(digest.hexdigest(), sum(file.stat().st_size for file in files))


def read_rate(path: Path) -> float:
    """Bytes per second of reading the largest file past the page cache, for at most a second."""
    largest = max(_files(path), key=lambda file: file.stat().st_size)
    descriptor = _open_direct(largest)
    try:
        # Aligned, as reading past the page cache wants it.
        with mmap.mmap(-1, _BLOCK_BYTES) as block:
            begun_s, num_bytes = time.monotonic(), 0
            while num_bytes < _MAX_BYTES and time.monotonic() - begun_s < _MAX_SECONDS:
                num_read = os.preadv(descriptor, [block], num_bytes)
                if num_read == 0:
                    break
                num_bytes += num_read
                if num_read % mmap.PAGESIZE:  # The end; another read from there would not be aligned.
                    break
            return num_bytes / max(time.monotonic() - begun_s, 1e-6)
    finally:
        os.close(descriptor)


def _open_direct(file: Path) -> int:
    try:
        return os.open(file, os.O_RDONLY | os.O_DIRECT)
    except OSError:  # The file system cannot, as overlays and memory cannot: drop its pages first.
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        return descriptor


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(file for file in path.iterdir() if file.is_file() and file.suffix in (".safetensors", ".json"))
