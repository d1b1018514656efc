"""The tensors of a GGUF file under Hugging Face's names, as the loader asks a checkpoint for them. Torch-free.

Quantized tensors are given as they stand: rows of blocks, [out, bytes of a row].
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.errors import CheckpointError
from engine.gguf.block_types import QUANTIZED_TYPES
from engine.gguf.model import read_model
from engine.gguf.names import NamedTensor
from engine.weights.safetensors_file import FLOAT_FORMATS, TensorEntry


@dataclass(frozen=True)
class GgufEntry(TensorEntry):
    """``format``: GGUF's own name. ``paired_rows``: rows of a head, where llama.cpp keeps them in the order of Meta's
    originals: the two elements that rotate together are neighbours, in Hugging Face's order they are half a head apart.
    Whole heads must be read, and be sorted then. 0 elsewhere."""

    paired_rows: int = 0

    @property
    def element_bytes(self) -> int:
        return 1 if self.format in QUANTIZED_TYPES else super().element_bytes


class GgufCheckpoint:
    """One file. Opening it reads its header, no weights. Its attributes are those of Checkpoint, ``directory`` being
    the file. Raises CheckpointError."""

    has_doubled_heads = False

    def __init__(self, path: str | Path) -> None:
        model = read_model(path)
        self.directory = model.header.path
        self.file_bytes = {self.directory: model.header.num_bytes}
        self._entries = {name: _entry(self.directory, part) for name, part in model.tensors.items()}

    def entry(
        self,
        name: str,
        shape: tuple[int, ...],
        formats: Sequence[str] = FLOAT_FORMATS,
        stored_shapes: Sequence[tuple[int, ...]] = (),
    ) -> TensorEntry:
        """As Checkpoint.entry; the shape of a quantized tensor is in bytes. Raises CheckpointError."""
        entry = self._entries.get(name)
        if entry is None:
            raise CheckpointError(f"{self.directory} has no tensor for {name!r}, which the model of its metadata needs")
        if entry.format not in formats:
            raise CheckpointError(
                f"{self.directory}: tensor {entry.name!r} is in {entry.format}; expected is {' or '.join(formats)}"
            )
        if entry.shape != shape:
            unit = " in bytes" if entry.format in QUANTIZED_TYPES else ""
            raise CheckpointError(
                f"{self.directory}: tensor {entry.name!r} has shape {list(entry.shape)}{unit}; "
                f"the file's metadata makes it {list(shape)}"
            )
        return entry


def _entry(path: Path, part: NamedTensor) -> GgufEntry:
    tensor, kind = part.tensor, part.tensor.type
    num_bytes = kind.num_bytes(math.prod(part.shape))
    shape = part.shape
    if kind.is_quantized:
        shape = (*shape[:-1], kind.num_bytes(shape[-1]))
    offset = tensor.offset + (part.expert or 0) * num_bytes
    return GgufEntry(tensor.name, path, kind.name, shape, offset, part.paired_rows)
