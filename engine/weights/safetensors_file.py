"""The tensors of one safetensors file, from its header alone.

Format: 8 bytes little-endian header length, a JSON header, then the data without gaps
(https://huggingface.co/docs/safetensors). Torch-free.
"""

import json
import math
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from engine.errors import CheckpointError

_MAX_HEADER_BYTES = 100_000_000
"""The format's own bound; beyond it the file is not safetensors."""
_MAX_DIM = 2**48
"""No dimension is larger; keeps products of a garbled shape small."""

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
        """Of the formats that are read."""
        return ELEMENT_BYTES[self.format]

    @property
    def num_bytes(self) -> int:
        """Of the formats that are read."""
        return math.prod(self.shape) * self.element_bytes


@dataclass(frozen=True)
class SafetensorsHeader:
    """``entries``: in the order of their data, which has no gaps. ``data_start``: byte where data begins.
    ``file_bytes``: of the file."""

    entries: tuple[TensorEntry, ...]
    data_start: int
    file_bytes: int

    def overlapping(self, begin: int, end: int) -> list[str]:
        """Names of the tensors with bytes in [begin, end)."""
        limits = [*(entry.offset for entry in self.entries[1:]), self.file_bytes]
        pairs = zip(self.entries, limits, strict=False)
        return [entry.name for entry, limit in pairs if max(entry.offset, begin) < min(limit, end)]


def read_header(path: Path) -> SafetensorsHeader:
    """Raises FileNotFoundError, and CheckpointError naming file and tensor where ``path`` is not a whole safetensors
    file."""
    # Without O_NONBLOCK the opening of a pipe would wait for its writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb", buffering=0) as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} is not a file")
        file_bytes = status.st_size
        header, data_start = _read_json(path, file, file_bytes)
    found = [
        _parse_entry(path, name, value, data_start, file_bytes)
        for name, value in header.items()
        if name != "__metadata__"
    ]
    found.sort(key=lambda pair: (pair[0].offset, pair[1]))
    _check_contiguous(path, found, data_start, file_bytes)
    return SafetensorsHeader(tuple(entry for entry, _ in found), data_start, file_bytes)


def _read_json(path: Path, file: BinaryIO, file_bytes: int) -> tuple[dict[str, Any], int]:
    """The header, and where the data begins."""
    prefix = file.read(8)
    header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
    if not 0 <= header_bytes <= min(_MAX_HEADER_BYTES, file_bytes - 8):
        raise CheckpointError(f"{path} is truncated or not a safetensors file ({file_bytes} bytes)")
    try:
        header = json.loads(file.read(header_bytes), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {str(error)[:200]!r}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} cannot be read as safetensors: its header is not an object")
    return header, 8 + int(header_bytes)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands there twice")
    return found


def _parse_entry(path: Path, name: str, value: Any, data_start: int, file_bytes: int) -> tuple[TensorEntry, int]:
    """And the byte behind its last one."""
    try:
        shape, (begin, end), format_name = value["shape"], value["data_offsets"], value["dtype"]
        for number in (*shape, begin, end):
            # A bool is an int to isinstance.
            if type(number) is not int or not 0 <= number <= _MAX_DIM:
                raise ValueError(f"{number!r} is no size")
        if not isinstance(format_name, str):
            raise ValueError(f"{format_name!r} is no format")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: the header's entry of tensor {name!r} is broken: {str(error)[:200]!r}"
        ) from error
    if not begin <= end or data_start + end > file_bytes:
        raise CheckpointError(
            f"{path} is truncated: tensor {name!r} ends at byte {data_start + end}, the file at {file_bytes}"
        )
    if format_name in ELEMENT_BYTES and end - begin != math.prod(shape) * ELEMENT_BYTES[format_name]:
        raise CheckpointError(
            f"{path}: tensor {name!r} of shape {list(shape)} in {format_name} has {end - begin} bytes of data"
        )
    return TensorEntry(name, path, format_name, tuple(shape), data_start + begin), data_start + end


def _check_contiguous(path: Path, found: list[tuple[TensorEntry, int]], data_start: int, file_bytes: int) -> None:
    """Data without gaps and overlaps, so that one wrong offset does not pass for another tensor's values."""
    expected = data_start
    for entry, end in found:
        if entry.offset != expected:
            raise CheckpointError(
                f"{path}: the data of tensor {entry.name!r} begins at byte {entry.offset}, not at {expected} where "
                "that before it ends"
            )
        expected = end
    if expected != file_bytes:
        last = f"tensor {found[-1][0].name!r}, the last," if found else "the header"
        raise CheckpointError(f"{path}: {last} ends at byte {expected}, the file at {file_bytes}")
