"""The checkpoint on this host: what it is, and how fast it comes from the disk."""

import hashlib
import mmap
import os
import time
from pathlib import Path

from huggingface_hub import constants

from cluster.doctor.facts import Checkpoint
from cluster.replica.model_source import ModelSource
from engine.errors import CheckpointError
from engine.weights.manifest import manifest_path

_BLOCK_BYTES = 4 * 2**20
_MAX_SECONDS = 1.0
_MAX_BYTES = 1024 * 2**20


def checkpoint_facts(source: ModelSource, num_bytes: int) -> Checkpoint:
    """What this host has of it. Downloads nothing, which would take longer than a host may take to answer, and reads no
    weights. ``num_bytes``: of a hub's model where it is whole."""
    try:
        path = source.cached()
        missing = max(0, num_bytes - source.cached_bytes())
        if path is not None and not missing:
            return _contents(path)
    except (CheckpointError, OSError) as error:
        return Checkpoint(error=str(error))
    if constants.HF_HUB_OFFLINE:
        return Checkpoint(error=f"{source.model} is not in this host's cache, and HF_HUB_OFFLINE is set there")
    return Checkpoint(bytes_to_download=missing)


def _contents(path: Path) -> Checkpoint:
    """Of a directory or a GGUF file."""
    files = _files(path)
    digest = hashlib.blake2b(digest_size=8)
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
    if (manifest := manifest_path(path)).is_file():
        digest.update(manifest.read_bytes())
    return Checkpoint(digest.hexdigest(), sum(file.stat().st_size for file in files))


def read_rate(path: Path) -> float:
    """Bytes per second of reading the largest file past the page cache, for at most a second. Raises OSError."""
    largest = max(_files(path), key=lambda file: file.stat().st_size)
    try:
        return _timed_read(largest, os.O_DIRECT)
    except OSError:  # The file system cannot, as overlays and memory cannot; what else it is, the second try shows.
        return _timed_read(largest, 0)


def _timed_read(file: Path, flags: int) -> float:
    descriptor = os.open(file, os.O_RDONLY | flags)
    try:
        if not flags:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
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


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(file for file in path.iterdir() if file.is_file() and file.suffix in (".safetensors", ".json"))
