"""Random weights of the right shapes, for sizing (``--load-format dummy``)."""

import math
import zlib
from collections.abc import Callable, Sequence

import torch

from engine.parameter import Conversion, TensorSlice, total_bytes

ProgressCallback = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) of the rank's own shard, in the served format."""


def fill_with_random_values(
    slices: Sequence[TensorSlice], conversions: Sequence[Conversion], on_progress: ProgressCallback
) -> None:
    """Norms one, biases zero, float matrices uniform with a standard deviation of 0.02, quantized ones with random
    codes and small scales; the same in every run."""
    total = total_bytes(slices) + total_bytes(conversions)
    done = 0
    for piece in slices:
        _fill(piece.destination, piece.name, f"{piece.name} {piece.start}")
        done += piece.num_bytes
        on_progress(done, total)
    for conversion in conversions:
        source = conversion.sources[0]
        for number, tensor in enumerate(conversion.destinations):
            _fill(tensor, "", f"{source.name} {source.start} {number}")
        done += conversion.num_bytes
        on_progress(done, total)


def _fill(destination: torch.Tensor, name: str, seed: str) -> None:
    generator = torch.Generator(destination.device)
    generator.manual_seed(zlib.crc32(seed.encode()))
    if name.endswith("norm.weight"):
        destination.fill_(1.0)
    elif name.endswith(".bias"):
        destination.zero_()
    elif destination.dtype == torch.float8_e4m3fn:
        values = torch.empty(destination.shape, device=destination.device).uniform_(-2.0, 2.0, generator=generator)
        destination.copy_(values)
    elif destination.dtype.is_floating_point:
        bound = 0.02 * math.sqrt(3)
        destination.uniform_(-bound, bound, generator=generator)
    elif destination.dtype == torch.int32:
        # Indices: the first is always one.
        destination.zero_()
    elif destination.dtype == torch.uint8:
        # GGUF's blocks have float16 scales among the bytes: like this they are below 0.01.
        destination.random_(0, 32, generator=generator)
    else:
        limits = torch.iinfo(destination.dtype)
        destination.random_(limits.min, limits.max, generator=generator)
