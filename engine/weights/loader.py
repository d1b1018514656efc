"""Fills a rank's parameters. Each rank reads only its own slices, by offset."""

from collections.abc import Sequence
from pathlib import Path

import torch

from engine.config import LoadFormat
from engine.model_config import ModelConfig
from engine.models.registry import Model, build_model
from engine.parallel.mesh import Mesh
from engine.parameter import Conversion, TensorSlice, total_bytes
from engine.weights.checkpoint import FLOAT_FORMATS, Checkpoint, TensorEntry
from engine.weights.dummy import ProgressCallback, fill_with_random_values
from engine.weights.slice_reader import TORCH_DTYPES, OpenFiles, read_slice

_STAGING_BYTES = 8 * 1024 * 1024


def verify_checkpoint(directory: str | Path, config: ModelConfig) -> None:
    """Check from the headers that ``directory`` holds every tensor of the model, rightly shaped.

    Reads no weights. Raises CheckpointError naming file and tensor.
    """
    model = build_model(config, Mesh(), config.dtype, torch.device("meta"))
    _find_tensors(Checkpoint(directory), model)


def load_weights(
    model: Model,
    directory: str | Path,
    load_format: LoadFormat = LoadFormat.SAFETENSORS,
    on_progress: ProgressCallback = lambda done, total: None,
) -> int:
    """Fill ``model``'s parameters and return how many bytes they have.

    Raises CheckpointError before any weight is read where the checkpoint does not suit the model, and while reading
    where a weight is NaN or infinite or a file ends early.
    """
    total = total_bytes(model.slices) + total_bytes(model.conversions)
    if load_format is LoadFormat.DUMMY:
        fill_with_random_values(model.slices, model.conversions, on_progress)
        return total
    work = _find_tensors(Checkpoint(directory), model)
    # In the order of the files' bytes, so that reading ahead helps.
    work.sort(key=lambda item: (item[0][0].file, item[0][0].offset))
    staging = bytearray(_STAGING_BYTES)
    done = 0
    with OpenFiles() as files:
        for entries, piece in work:
            if isinstance(piece, Conversion):
                _run_conversion(files, entries, piece, staging)
                done += piece.num_bytes
                on_progress(done, total)
                continue
            for num_bytes in read_slice(files, entries[0], piece, staging):
                done += num_bytes
                on_progress(done, total)
    return total


_Work = list[tuple[list[TensorEntry], TensorSlice | Conversion]]


def _find_tensors(checkpoint: Checkpoint, model: Model) -> _Work:
    """What to read for each piece of the model. Raises CheckpointError where a tensor is missing or different."""
    work: _Work = []
    for piece in model.slices:
        work.append(([checkpoint.entry(piece.name, piece.shape, _formats(piece.destination.dtype))], piece))
    for conversion in model.conversions:
        entries = [checkpoint.entry(s.name, s.shape, s.formats, s.stored_shapes) for s in conversion.sources]
        work.append((entries, conversion))
    return work


def _formats(dtype: torch.dtype) -> tuple[str, ...]:
    """Formats from which a parameter of ``dtype`` is copied."""
    if dtype in (torch.float32, torch.float16, torch.bfloat16):
        return FLOAT_FORMATS
    return tuple(name for name, candidate in TORCH_DTYPES.items() if candidate == dtype)


def _run_conversion(
    files: OpenFiles, entries: Sequence[TensorEntry], conversion: Conversion, staging: bytearray
) -> None:
    sources: list[torch.Tensor] = []
    device = conversion.destinations[0].device
    for entry, source in zip(entries, conversion.sources, strict=True):
        # A tensor that may be shorter than its source is read whole.
        size = source.size if entry.shape == source.shape else entry.shape
        tensor = torch.empty(size, dtype=TORCH_DTYPES[entry.format])
        piece = TensorSlice(source.name, source.shape, source.start, tensor)
        for _ in read_slice(files, entry, piece, staging):
            pass
        sources.append(tensor.to(device))
    conversion.convert(*sources)
