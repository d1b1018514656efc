"""What ranks hold in common, by keys: pieces of equal keys are of equal bytes, whichever rank has loaded them.

A key says what the loader was asked for (which rectangles of which tensors, and what becomes of them) and what decides
besides which bytes that gives: the checkpoint and the software, by their digests, and for what is converted the machine
too, for some conversions lay weights out as its processor likes them best.
"""

import functools
import hashlib
import platform
from collections.abc import Iterable, Iterator, Mapping

import msgspec
import torch

from engine.config import Dtype, LoadFormat
from engine.kernels.linear import has_tiles
from engine.parallel.mesh import Mesh
from engine.parameter import Conversion, TensorSlice
from engine.quantization.cpu_int4 import is_packed_as_here
from engine.weights.slice_reader import blocks_of_size

Piece = TensorSlice | Conversion
KEY_BYTES = 16
_EXPERTS = ".experts."


class PieceKeys:
    """Of one rank's pieces.

    Args:
        runs: versions and digests of what the rank's process is made of, its checkpoint among them (WorkerConfig).
        quantization: as WorkerConfig has it.
        mesh: where the rank stands.
    """

    def __init__(
        self,
        runs: Mapping[str, str],
        load_format: LoadFormat,
        dtype: Dtype,
        quantization: str | None,
        mesh: Mesh,
        device: torch.device,
    ) -> None:
        self._source = [sorted(runs.items()), load_format.value, dtype.value, quantization]
        # Some conversions cut a tensor that is read whole: what they make is this tp rank's.
        division = [mesh.config.tp, mesh.tp_rank, mesh.config.determinism.value, mesh.config.num_shards]
        self._division, self._device = division, device

    def of(self, piece: Piece) -> bytes | None:
        """KEY_BYTES; None: no other rank is asked for it. Experts are divided among all ranks of a stage, and move."""
        content: list[object]
        if isinstance(piece, TensorSlice):
            names, tensors = [piece.name], [piece.destination]
            content = ["slice", piece.name, piece.shape, piece.start]
        else:
            names, tensors = [source.name for source in piece.sources], list(piece.destinations)
            sources = [
                (each.name, each.shape, each.start, each.size, each.formats, each.stored_shapes)
                for each in piece.sources
            ]
            content = ["conversion", sources, self._division, _machine(self._device)]
        if any(_EXPERTS in name for name in names) or not all(tensor.numel() for tensor in tensors):
            return None
        forms = [(tuple(tensor.shape), str(tensor.dtype)) for tensor in tensors]
        encoded = msgspec.msgpack.encode([self._source, content, forms])
        return hashlib.blake2b(encoded, digest_size=KEY_BYTES).digest()


class Shard:
    """The pieces of a model that has just been loaded, for others. What is changed afterwards is held no more: torch
    counts the changes of a tensor."""

    def __init__(self, pieces: Iterable[Piece], keys: PieceKeys) -> None:
        self._held: dict[bytes, list[tuple[torch.Tensor, int]]] = {}
        for piece in pieces:
            if (key := keys.of(piece)) is not None:
                self._held[key] = [(tensor, tensor._version) for tensor in destinations(piece)]

    def get(self, key: bytes) -> list[torch.Tensor] | None:
        """The tensors that the piece has filled, as they were loaded; None: not held. From any thread."""
        held = self._held.get(key)
        if held is None or any(tensor._version != loaded for tensor, loaded in held):
            return None
        return [tensor for tensor, _ in held]


def destinations(piece: Piece) -> tuple[torch.Tensor, ...]:
    """What the piece fills."""
    return (piece.destination,) if isinstance(piece, TensorSlice) else piece.destinations


def blocks_of(tensors: Iterable[torch.Tensor], most_bytes: int) -> Iterator[torch.Tensor]:
    """Views of at most ``most_bytes`` that cover the tensors; cut in the same way wherever shapes and formats are the
    same. No tensor is empty."""
    for tensor in tensors:
        whole = tensor.reshape(1) if tensor.dim() == 0 else tensor
        for offset, size in blocks_of_size(tuple(whole.shape), most_bytes // whole.element_size()):
            block = whole
            for dim, (first, count) in enumerate(zip(offset, size, strict=True)):
                block = block.narrow(dim, first, count)
            yield block


def bytes_of(block: torch.Tensor) -> memoryview:
    """A block's values, row by row: of its own memory where they lie so there, else of a copy."""
    return block.cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def fill_block(block: torch.Tensor, data: bytes | memoryview) -> None:
    """The reverse of ``bytes_of``. ``data`` has as many bytes as ``block``."""
    is_in_place = block.is_cpu and block.is_contiguous()
    target = block if is_in_place else torch.empty(block.shape, dtype=block.dtype)
    target.view(-1).view(torch.uint8).numpy().data[:] = data
    if not is_in_place:
        block.copy_(target)


@functools.cache
def _machine(device: torch.device) -> list[object]:
    """What conversions may look at when they choose how weights lie, or compute with."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return [
        platform.machine(),
        torch.backends.cpu.get_cpu_capability(),
        has_tiles(),
        is_packed_as_here(),
        device.type,
        gpu,
    ]
