"""What sampling takes from logits, on any device, and on none of them with a wait of the host for it."""

import ctypes
import functools

import torch

from engine.kernels.gpu import runs_on_gpu
from engine.kernels.native_library import tile_library


def most_likely(logits: torch.Tensor) -> torch.Tensor:
    """[R] int64: the column of each row's maximum in ``logits`` [R, vocab] float32, the lowest among equals; −1 where
    the maximum is no finite number (a NaN, an infinity, or nothing but minus infinity)."""
    if runs_on_gpu(logits):
        from engine.kernels.triton.greedy import greedy

        return greedy(logits.contiguous())
    library = _library()
    if library is not None and not logits.is_cuda and logits.dtype is torch.float32 and logits.stride(1) == 1:
        found = torch.empty(len(logits), dtype=torch.int64)
        library.remuda_most_likely(logits.data_ptr(), logits.stride(0), found.data_ptr(), *logits.shape)
        return found
    # amax hands on NaN, so one pass sees NaN, an infinity, and rows that are minus infinity throughout.
    return logits.argmax(dim=-1).masked_fill_(~torch.isfinite(logits.amax(dim=-1)), -1)


def gpu_nucleus_border(weights: torch.Tensor, goals: torch.Tensor, num_bits: int) -> torch.Tensor | None:
    """See engine.kernels.triton.nucleus_border; None where the kernel does not serve."""
    if not runs_on_gpu(weights):
        return None
    from engine.kernels.triton.nucleus_border import nucleus_border

    return nucleus_border(weights.contiguous(), goals, num_bits)


@functools.cache
def _library() -> ctypes.CDLL | None:
    """None where the library was not built or the CPU has no wide registers."""
    library = tile_library()
    if library is None:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.remuda_most_likely.argtypes = [pointer, number, pointer, number, number]
    library.remuda_most_likely.restype = None
    return library
