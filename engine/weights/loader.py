"""Fills a rank's parameters. Each rank reads only its own slices, by offset."""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch

from engine.config import LoadFormat
from engine.gguf.header import is_gguf
from engine.model_config import ModelConfig
from engine.models.registry import Model, build_model
from engine.parallel.mesh import Mesh
from engine.parameter import Conversion, TensorSlice, total_bytes
from engine.weights.checkpoint import FLOAT_FORMATS, Checkpoint, TensorEntry
from engine.weights.dummy import ProgressCallback, fill_with_random_values
from engine.weights.gguf_checkpoint import GgufCheckpoint
from engine.weights.load_check import HostShare, LoadCheck, open_manifest
from engine.weights.slice_reader import TORCH_DTYPES, OpenFiles, read_slice


class Pieces(Protocol):
    """Parameters and where they come from: a model, or a part of one."""

    @property
    def slices(self) -> tuple[TensorSlice, ...]: ...

    @property
    def conversions(self) -> tuple[Conversion, ...]: ...


FillFromOthers = Callable[[Sequence[TensorSlice | Conversion]], Iterator[TensorSlice | Conversion]]
"""Fills pieces exactly as the loader would, and yields each that is whole; it may leave out any."""

_STAGING_BYTES = 8 * 1024 * 1024
_log = logging.getLogger(__name__)


def verify_checkpoint(directory: str | Path, config: ModelConfig) -> None:
    """Check from the headers that ``directory`` holds every tensor of the model, rightly shaped.

    Reads no weights; compares sizes with the manifest, where there is one. Raises CheckpointError naming file and
    tensor.
    """
    open_manifest(Path(directory))
    _find_tensors(open_checkpoint(directory, config), _whole_model(config))


def load_weights(
    model: Model,
    directory: str | Path,
    load_format: LoadFormat = LoadFormat.SAFETENSORS,
    on_progress: ProgressCallback = lambda done, total: None,
    share: HostShare = HostShare(),
    fill_from_others: FillFromOthers = lambda pieces: iter(()),
) -> int:
    """Fill ``model``'s parameters and return how many bytes they have. What ``fill_from_others`` leaves out is read.

    Where the checkpoint has a manifest, this rank checks its ``share`` of the hashes meanwhile; if it reads no weights
    at all, of the hashes of the other files.

    Raises CheckpointError before any weight is read where the checkpoint does not suit the model or its manifest, and
    while reading where a weight is NaN or infinite, a file changes its size or a hash is wrong.
    """
    total = total_bytes(model.slices) + total_bytes(model.conversions)
    if load_format is LoadFormat.DUMMY:
        fill_with_random_values(model.slices, model.conversions, on_progress)
        return total
    checkpoint = open_checkpoint(directory, model.config)
    work = _find_tensors(checkpoint, model)
    if checkpoint.has_doubled_heads and share.index == 0:
        _log.warning("%s stores every key-value head twice; one of each pair is read", directory)
    # In the order of the files' bytes, so that reading ahead helps.
    work.sort(key=lambda item: (item[0][0].file, item[0][0].offset))
    done, filled = 0, set[int]()
    for piece in fill_from_others([piece for _, piece in work]):
        filled.add(id(piece))
        done += piece.num_bytes
        on_progress(done, total)
    work = [(entries, piece) for entries, piece in work if id(piece) not in filled]
    with _hash_check(checkpoint, model.config, share, reads_weights=bool(work)) as check:
        for num_bytes in _read(checkpoint, work):
            done += num_bytes
            on_progress(done, total)
            check.raise_failure()
        check.finish()
    return total


def read_pieces(checkpoint: Checkpoint | GgufCheckpoint, pieces: Pieces) -> Iterator[int]:
    """Fill parameters that were made after a model was loaded; yields bytes as they are filled.

    Raises CheckpointError as ``load_weights`` does. Hashes are not checked.
    """
    yield from _read(checkpoint, _find_tensors(checkpoint, pieces))


def _read(checkpoint: Checkpoint | GgufCheckpoint, work: "_Work") -> Iterator[int]:
    staging = bytearray(_STAGING_BYTES)
    with OpenFiles(checkpoint.file_bytes) as files:
        for entries, piece in work:
            if isinstance(piece, Conversion):
                _run_conversion(files, entries, piece, staging)
                yield piece.num_bytes
            else:
                yield from read_slice(files, entries[0], _as_stored(piece, entries[0]), staging)
        files.check_sizes()


def open_checkpoint(directory: str | Path, config: ModelConfig) -> Checkpoint | GgufCheckpoint:
    """Reads headers, no weights. Raises CheckpointError."""
    if is_gguf(directory):
        return GgufCheckpoint(directory)
    aliases = {}
    if config.tie_word_embeddings:
        prefix = config.tensor_prefix
        aliases[f"{prefix}model.embed_tokens.weight"] = f"{prefix}lm_head.weight"
    return Checkpoint(directory, config.head_dim, aliases)


def _whole_model(config: ModelConfig) -> Model:
    return build_model(config, Mesh(), config.dtype, torch.device("meta"))


def _hash_check(
    checkpoint: Checkpoint | GgufCheckpoint, config: ModelConfig, share: HostShare, *, reads_weights: bool
) -> LoadCheck:
    manifest = open_manifest(checkpoint.directory)
    needed: list[TensorEntry] = []
    if manifest is not None and reads_weights:
        # Of all ranks, so that those of a host divide the same list.
        needed = [entry for entries, _ in _find_tensors(checkpoint, _whole_model(config)) for entry in entries]
    return LoadCheck(checkpoint.directory, manifest, needed, share)


def _as_stored(piece: TensorSlice, entry: TensorEntry) -> TensorSlice:
    """The same rectangle in the dimensions of ``entry``, which has one of each pair of heads to be read."""
    if len(entry.shape) == len(piece.shape):
        return piece
    head_dim = entry.shape[2]
    heads, first_head = piece.destination.shape[0] // head_dim, piece.start[0] // head_dim
    destination = piece.destination.unflatten(0, (heads, 1, head_dim))
    return TensorSlice(piece.name, entry.shape, (first_head, 0, 0, *piece.start[1:]), destination)


_Work = list[tuple[list[TensorEntry], TensorSlice | Conversion]]


def _find_tensors(checkpoint: Checkpoint | GgufCheckpoint, model: Pieces) -> _Work:
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
        is_shorter = len(entry.shape) == 1 and entry.shape != source.shape
        size = entry.shape if is_shorter else source.size
        tensor = torch.empty(size, dtype=TORCH_DTYPES[entry.format])
        piece = TensorSlice(source.name, source.shape, source.start, tensor)
        for _ in read_slice(files, entry, _as_stored(piece, entry), staging):
            pass
        sources.append(tensor.to(device))
    conversion.convert(*sources)
