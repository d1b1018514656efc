"""What is still to be done to a slice of a GGUF file when it has been read: scales checked, paired rows sorted."""

import torch

from engine.errors import CheckpointError
from engine.gguf.block_types import QUANTIZED_TYPES
from engine.quantization.gguf_blocks import scales_are_finite
from engine.weights.gguf_checkpoint import GgufEntry


def finish_slice(entry: GgufEntry, destination: torch.Tensor) -> None:
    """In place. ``destination`` holds whole blocks, and whole heads where rows are paired.

    Raises CheckpointError, naming file and tensor, for a scale that is NaN or infinite.
    """
    if entry.format in QUANTIZED_TYPES and not scales_are_finite(destination, entry.format):
        raise CheckpointError(f"{entry.file}: tensor {entry.name!r} holds NaN or infinite scales")
    if entry.paired_rows:
        pairs = destination.unflatten(0, (-1, entry.paired_rows // 2, 2))
        destination.copy_(pairs.transpose(1, 2).flatten(0, 2))
