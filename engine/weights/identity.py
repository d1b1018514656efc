"""What tells one checkpoint from another, without reading it all. Torch-free.

KV blocks are named by it (engine.block_hash), so it must be equal wherever the same checkpoint lies, and differ for
another training state of the same shapes.
"""

import hashlib
from pathlib import Path

from engine.weights.manifest import covered_files

_NUM_SAMPLES = 64
_SAMPLE_BYTES = 4096


def checkpoint_identity(checkpoint: Path) -> str:
    """A hash over names, sizes and samples of the files that are read to serve a model; of small files, over all.

    Fine-tuning changes nearly every value, so samples show it. Nothing depends on times or directories.

    Raises CheckpointError where there is no checkpoint, OSError where it cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in covered_files(checkpoint):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            for sample in range(_NUM_SAMPLES):
                file.seek(sample * max(size - _SAMPLE_BYTES, 0) // (_NUM_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
                if size <= _SAMPLE_BYTES:
                    break
    return digest.hexdigest()
