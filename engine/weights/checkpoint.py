"""The tensors of a safetensors checkpoint: where each one lies, read from the files' headers alone.

Format: 8 bytes little-endian header length, a JSON header, then the data
(https://huggingface.co/docs/safetensors). A checkpoint is one file or several shards with an index.
"""

import dataclasses
import json
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError

_INDEX_FILE = "model.safetensors.index.json"
_SINGLE_FILE = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000
"""The format's own bound; beyond it the file is not safetensors."""

FLOAT_FORMATS = ("F32", "F16", "BF16")
"""Formats that unquantized weights are read from."""
ELEMENT_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I8": 1, "U8": 1, "I32": 4, "I64": 8}
"""Bytes per element of every format that is read."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor in a file. ``offset``: of its first byte from the file's beginning."""

    name: str
    file: Path
    format: str
    shape: tuple[int, ...]
    offset: int

    @property
    def element_bytes(self) -> int:
        return ELEMENT_BYTES[self.format]


class Checkpoint:
    """The tensors of a directory, by name. Opening it reads headers, no weights.

    Raises CheckpointError, naming the file, where one is missing, truncated or not safetensors.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._index = _read_index(self.directory)
        files = sorted(set(self._index.values())) if self._index else [_SINGLE_FILE]
        self._entries: dict[str, TensorEntry] = {}
        for name in files:
            for entry in _read_header(self.directory / name, self._tensors_of(name)):
                self._entries[entry.name] = entry

    def entry(
        self,
        name: str,
        shape: tuple[int, ...],
        formats: Sequence[str] = FLOAT_FORMATS,
        stored_shapes: Sequence[tuple[int, ...]] = (),
    ) -> TensorEntry:
        """The tensor ``name``, whose shape must be ``shape`` (or one of ``stored_shapes``, with as many elements: then
        it is given as one of ``shape``) and whose format one of ``formats``.

        Raises CheckpointError, naming file and tensor, where it is missing or different.
        """
        entry = self._entries.get(name)
        if entry is None:
            where = self.directory / self._index[name] if name in self._index else self.directory
            raise CheckpointError(f"{where} has no tensor {name!r}, which the model of its config.json needs")
        if entry.shape in stored_shapes:
            entry = dataclasses.replace(entry, shape=shape)
        if entry.shape != shape:
            raise CheckpointError(
                f"{entry.file}: tensor {name!r} has shape {list(entry.shape)}; config.json makes it {list(shape)}"
            )
        if entry.format not in formats:
            raise CheckpointError(
                f"{entry.file}: tensor {name!r} is in format {entry.format}; expected is {' or '.join(formats)}"
            )
        return entry

    def _tensors_of(self, file_name: str) -> str:
        """For messages: an example of what a file should hold."""
        names = sorted(name for name, file in self._index.items() if file == file_name)
        return f" (it should hold {len(names)} tensors, {names[0]!r} the first)" if names else ""


def tensors_of_file(path: Path) -> dict[str, TensorEntry]:
    """All tensors of one safetensors file, by name. Raises CheckpointError as Checkpoint does."""
    return {entry.name: entry for entry in _read_header(path, "")}


def _read_index(directory: Path) -> dict[str, str]:
    """Tensor name to file name; empty where the checkpoint is a single file."""
    path = directory / _INDEX_FILE
    if not path.exists():
        if not (directory / _SINGLE_FILE).exists():
            raise CheckpointError(
                f"{directory} has neither {_SINGLE_FILE} nor {_INDEX_FILE}; only safetensors checkpoints are read"
            )
        return {}
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        index = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not an index of safetensors files: {error!r}") from error
    for name, file in index.items():
        if Path(file).name != file:
            raise CheckpointError(f"{path} places tensor {name!r} outside its directory, in {file!r}")
    return index


def _read_header(path: Path, content: str) -> Iterable[TensorEntry]:
    """All tensors of a file; ``content`` is added to the message where the file is missing."""
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 0 <= header_bytes <= min(_MAX_HEADER_BYTES, file_bytes - 8):
                raise CheckpointError(f"{path} is truncated or not a safetensors file ({file_bytes} bytes)")
            header = json.loads(file.read(header_bytes))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing{content}") from error
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} cannot be read as safetensors: its header is not an object")
    data_start = 8 + header_bytes
    return [
        _parse_entry(path, name, value, data_start, file_bytes)
        for name, value in header.items()
        if name != "__metadata__"
    ]


def _parse_entry(path: Path, name: str, value: Any, data_start: int, file_bytes: int) -> TensorEntry:
    try:
        shape = tuple(int(size) for size in value["shape"])
        begin, end = (int(offset) for offset in value["data_offsets"])
        format_name = str(value["dtype"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the header's entry of tensor {name!r} is broken: {error!r}") from error
    if not 0 <= begin <= end or data_start + end > file_bytes:
        raise CheckpointError(
            f"{path} is truncated: tensor {name!r} ends at byte {data_start + end}, the file at {file_bytes}"
        )
    if format_name in ELEMENT_BYTES and end - begin != math.prod(shape) * ELEMENT_BYTES[format_name]:
        raise CheckpointError(
            f"{path}: tensor {name!r} of shape {list(shape)} in {format_name} has {end - begin} bytes of data"
        )
    return TensorEntry(name, path, format_name, shape, data_start + begin)
