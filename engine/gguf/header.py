"""What stands before the weights in a GGUF file, versions 2 and 3: metadata, and where each tensor lies. Torch-free.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Numbers are little endian.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from engine.errors import CheckpointError
from engine.gguf.block_types import BLOCK_TYPES, BlockType, type_name

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Kind of value to struct's letter."""


def is_gguf(path: str | Path) -> bool:
    """Whether a checkpoint's path names a GGUF file rather than a directory."""
    return Path(path).suffix == ".gguf"


@dataclass(frozen=True)
class GgufTensor:
    """One tensor. ``shape``: outermost dimension first, as everywhere else (the file has it the other way round).
    ``type_number``: of its format. ``offset``: of its first byte from the file's beginning."""

    name: str
    shape: tuple[int, ...]
    type_number: int
    offset: int

    @property
    def type(self) -> BlockType:
        """Its format, which must be one of those served."""
        return BLOCK_TYPES[self.type_number]


@dataclass(frozen=True)
class GgufHeader:
    """``metadata``: by key; arrays are lists. ``tensors``: by name. ``num_bytes``: of the whole file."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    num_bytes: int


def read_header(path: str | Path) -> GgufHeader:
    """Raises CheckpointError, naming the file, where it is missing, truncated, broken or no such GGUF file."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _Reader(path, file).header()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


class _Reader:
    """Reads value after value, and never more than the file has."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self._num_bytes = path.stat().st_size

    def header(self) -> GgufHeader:
        if self._file.read(len(_MAGIC)) != _MAGIC:
            raise CheckpointError(f"{self._path} is not a GGUF file: it does not begin with {_MAGIC.decode()}")
        version = self._number("I")
        if version not in _VERSIONS:
            why = "it is big endian" if version & 0xFFFF == 0 and version else f"it is of version {version}"
            raise CheckpointError(f"{self._path} is not served: {why}; little-endian versions 2 and 3 are")
        num_tensors, num_values = self._count(24), self._count(12)
        metadata: dict[str, Any] = {}
        for _ in range(num_values):
            key = self._string()
            if key in metadata:
                raise self._broken(f"the key {key!r} stands there twice")
            metadata[key] = self._value(self._number("I"), key)
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._broken(f"general.alignment is {alignment!r}, which is no power of two")
        relative = [self._tensor() for _ in range(num_tensors)]
        start = -(-self._file.tell() // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for tensor in relative:
            if tensor.name in tensors:
                raise self._broken(f"the tensor {tensor.name!r} stands there twice")
            tensors[tensor.name] = self._placed(tensor, start, alignment)
        return GgufHeader(self._path, metadata, tensors, self._num_bytes)

    def _broken(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._path} is broken: {what}")

    def _bytes(self, count: int) -> bytes:
        data = self._file.read(count) if count <= self._num_bytes else b""
        if len(data) != count:
            raise CheckpointError(
                f"{self._path} is truncated or broken: {count} bytes are due at byte {self._file.tell() - len(data)} "
                f"of {self._num_bytes}"
            )
        return data

    def _number(self, letter: str) -> Any:
        return struct.unpack(f"<{letter}", self._bytes(struct.calcsize(f"<{letter}")))[0]

    def _count(self, least_bytes: int) -> int:
        """How many things of ``least_bytes`` or more follow."""
        count = int(self._number("Q"))
        if count * least_bytes > self._num_bytes:
            raise self._broken(f"it announces {count} entries in {self._num_bytes} bytes")
        return count

    def _string(self) -> str:
        data = self._bytes(self._count(1))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._broken(f"the string {data[:40]!r} is not UTF-8") from error

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind != _ARRAY:
            raise self._broken(f"the value of {key!r} is of unknown kind {kind}")
        inner = self._number("I")
        if inner == _STRING:
            return [self._string() for _ in range(self._count(8))]
        if inner not in _SCALARS:
            raise self._broken(f"the array {key!r} holds values of kind {inner}")
        letter = _SCALARS[inner]
        count = self._count(struct.calcsize(f"<{letter}"))
        return list(struct.unpack(f"<{count}{letter}", self._bytes(count * struct.calcsize(f"<{letter}"))))

    def _tensor(self) -> GgufTensor:
        """With its offset from the beginning of the data."""
        name = self._string()
        num_dims = self._number("I")
        if num_dims > _MAX_DIMS:
            raise self._broken(f"tensor {name!r} has {num_dims} dimensions")
        shape = tuple(int(self._number("Q")) for _ in range(num_dims))[::-1]
        return GgufTensor(name, shape, int(self._number("I")), int(self._number("Q")))

    def _placed(self, tensor: GgufTensor, start: int, alignment: int) -> GgufTensor:
        """With its offset in the file. A format that is not served is left for whoever asks for the tensor."""
        if tensor.offset % alignment:
            raise self._broken(f"tensor {tensor.name!r} does not begin at a multiple of {alignment} bytes")
        kind = BLOCK_TYPES.get(tensor.type_number)
        if kind is None:
            end = start + tensor.offset
        else:
            if not tensor.shape or tensor.shape[-1] % kind.block_elements:
                raise self._broken(
                    f"rows of tensor {tensor.name!r} of shape {list(tensor.shape)} are no whole {kind.name} blocks"
                )
            end = start + tensor.offset + kind.num_bytes(math.prod(tensor.shape))
        if end > self._num_bytes:
            raise CheckpointError(
                f"{self._path} is truncated: tensor {tensor.name!r} ({type_name(tensor.type_number)}) ends at byte "
                f"{end}, the file at {self._num_bytes}"
            )
        return GgufTensor(tensor.name, tensor.shape, tensor.type_number, start + tensor.offset)
