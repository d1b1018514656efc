"""Matrix products of few tokens, where reading the weights is what takes the time."""

import ctypes
import functools
from collections.abc import Callable

import torch
from torch.nn import functional

from engine.kernels.native_library import native_library

_MOST_TOKENS = 128
"""Above, oneDNN's product of unpacked weights is as fast."""
_STEP = 32
"""What the kernel computes at once, of inputs and of outputs."""

_Kernel = Callable[[int, int, int, int, int, int, int], None]


def linear(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``hidden`` [T, in] times the transpose of ``weight`` [out, in], with float32 sums: [T, out].

    On a CPU with tile units (AMX) a few bfloat16 tokens take one pass over the weights as they lie in memory, at the
    speed of reading them (docs/performance.md), and a token's result does not depend on the others. The rest is torch's.
    """
    if weight.dtype is not torch.bfloat16 or weight.device.type != "cpu":
        return functional.linear(hidden, weight)
    num_tokens = hidden.numel() // hidden.shape[-1] if hidden.shape[-1] else 0
    kernel = _tile_kernel()
    num_outputs, num_inputs = weight.shape
    if (
        kernel is None
        or not 0 < num_tokens <= _MOST_TOKENS
        or num_inputs % _STEP
        or num_outputs % _STEP
        or not weight.is_contiguous()
    ):
        return functional.linear(hidden, weight)
    hidden = hidden.contiguous()
    output = hidden.new_empty(*hidden.shape[:-1], num_outputs)
    scratch = hidden.new_empty(-(-num_tokens // _STEP) * _STEP * num_inputs)
    kernel(
        weight.data_ptr(),
        hidden.data_ptr(),
        output.data_ptr(),
        scratch.data_ptr(),
        num_tokens,
        num_inputs,
        num_outputs,
    )
    return output


@functools.cache
def _tile_kernel() -> _Kernel | None:
    """None where the library was not built or the CPU has no tile units."""
    library = native_library()
    if library is None or not library.remuda_has_tiles():
        return None
    function = library.remuda_linear_bf16
    function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 3
    function.restype = None
    kernel: _Kernel = function
    return kernel
