"""Reads a rectangle of a tensor from its file, by offset, through a small staging buffer.

Files are read, not mapped: mapped pages would count as the rank's memory.
"""

import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

import torch

from engine.errors import CheckpointError
from engine.gguf.block_types import QUANTIZED_TYPES
from engine.parameter import TensorSlice
from engine.weights.gguf_checkpoint import GgufEntry
from engine.weights.gguf_slices import finish_slice
from engine.weights.safetensors_file import TensorEntry

_MIN_RUN_BYTES = 4096
"""Shorter runs are not read one by one: whole rows are, which touches the same pages of the file."""

TORCH_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
    **dict.fromkeys(QUANTIZED_TYPES, torch.uint8),
}


class OpenFiles:
    """File descriptors by path, opened when first asked for and closed together.

    ``file_bytes``: how large the files were when their headers were read.
    """

    def __init__(self, file_bytes: Mapping[Path, int] = MappingProxyType({})) -> None:
        self._file_bytes = file_bytes
        self._descriptors: dict[Path, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def descriptor(self, path: Path) -> int:
        if path not in self._descriptors:
            self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._descriptors[path]

    def check_sizes(self) -> None:
        """Raises CheckpointError where a file that was read has changed its size."""
        for path, descriptor in self._descriptors.items():
            now = os.fstat(descriptor).st_size
            if now != self._file_bytes.get(path, now):
                raise CheckpointError(f"{path} changed from {self._file_bytes[path]} to {now} bytes while it was read")


def read_slice(files: OpenFiles, entry: TensorEntry, piece: TensorSlice, staging: bytearray) -> Iterator[int]:
    """Read one slice block by block; yields the bytes (of the destination) that each block filled."""
    if piece.destination.numel() == 0:
        return
    descriptor = files.descriptor(entry.file)
    limit = len(staging) // entry.element_bytes
    start, size = list(piece.start), list(piece.destination.shape)
    widened = _dim_to_widen(entry, size, limit)
    if widened is not None:
        start[widened], size[widened] = 0, entry.shape[widened]
    for offset, block_size in blocks_of_size(tuple(size), limit):
        num_elements = math.prod(block_size)
        first = [s + o for s, o in zip(start, offset, strict=True)]
        _read_block(descriptor, entry, first, block_size, memoryview(staging)[: num_elements * entry.element_bytes])
        values = torch.frombuffer(staging, dtype=TORCH_DTYPES[entry.format], count=num_elements).view(block_size)
        destination = piece.destination
        for dim, (first_index, count) in enumerate(zip(offset, block_size, strict=True)):
            if dim != widened:
                destination = destination.narrow(dim, first_index, count)
        if widened is not None:
            values = values.narrow(widened, piece.start[widened], piece.destination.shape[widened])
        _check_finite(values, entry)
        destination.copy_(values)
        yield destination.numel() * destination.element_size()
    if isinstance(entry, GgufEntry):
        finish_slice(entry, piece.destination)


def _dim_to_widen(entry: TensorEntry, size: Sequence[int], limit: int) -> int | None:
    """The dimension to read in full although only a part is wanted, because the parts are shorter than a page."""
    partial = [dim for dim, (n, whole) in enumerate(zip(size, entry.shape, strict=True)) if n != whole]
    if not partial or partial[-1] == 0:
        return None
    dim = partial[-1]
    row = math.prod(entry.shape[dim + 1 :])
    is_short = size[dim] * row * entry.element_bytes < _MIN_RUN_BYTES
    return dim if is_short and entry.shape[dim] * row <= limit else None


def blocks_of_size(
    size: tuple[int, ...], limit: int, offset: tuple[int, ...] = ()
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut a rectangle into blocks of at most ``limit`` elements: yields (offset, size), in order of memory."""
    dim = len(offset)
    inner = math.prod(size[dim + 1 :])
    if inner > limit:
        for index in range(size[dim]):
            yield from blocks_of_size(size, limit, (*offset, index))
        return
    step = limit // inner
    rest = size[dim + 1 :]
    for first in range(0, size[dim], step):
        count = min(step, size[dim] - first)
        yield (*offset, first, *(0,) * len(rest)), (*(1,) * dim, count, *rest)


def _read_block(
    descriptor: int, entry: TensorEntry, start: Sequence[int], size: Sequence[int], target: memoryview
) -> None:
    """Read the rectangle of ``size`` at ``start`` into ``target``, run by contiguous run."""
    strides = [math.prod(entry.shape[dim + 1 :]) for dim in range(len(size))]
    partial = [dim for dim, (n, whole) in enumerate(zip(size, entry.shape, strict=True)) if n != whole]
    run_dim = partial[-1] if partial else 0
    run_bytes = size[run_dim] * strides[run_dim] * entry.element_bytes
    base = entry.offset + entry.element_bytes * sum(s * stride for s, stride in zip(start, strides, strict=True))
    position = 0
    for index in itertools.product(*(range(n) for n in size[:run_dim])):
        outer = sum(i * stride for i, stride in zip(index, strides[:run_dim], strict=True))
        _read_run(descriptor, entry, base + outer * entry.element_bytes, target[position : position + run_bytes])
        position += run_bytes


def _read_run(descriptor: int, entry: TensorEntry, offset: int, buffer: memoryview) -> None:
    done = 0
    while done < len(buffer):
        num_bytes = os.preadv(descriptor, [buffer[done:]], offset + done)
        if num_bytes == 0:
            raise CheckpointError(f"{entry.file} became shorter while tensor {entry.name!r} was read")
        done += num_bytes


def _check_finite(values: torch.Tensor, entry: TensorEntry) -> None:
    if values.dtype == torch.float8_e4m3fn:
        is_finite = not bool(((values.view(torch.uint8) & 0x7F) == 0x7F).any())
    elif values.dtype.is_floating_point:
        # NaN is passed on by both; one pass without scratch memory.
        low, high = torch.aminmax(values)
        is_finite = math.isfinite(low.item()) and math.isfinite(high.item())
    else:
        return
    if not is_finite:
        raise CheckpointError(f"{entry.file}: tensor {entry.name!r} holds NaN or infinite weights")
