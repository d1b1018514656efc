"""float8 (e4m3) with a scale for each tensor or row: compressed-tensors' float-quantized, fbgemm's, and on the fly.

Formats and recipes: "FP8 Formats for Deep Learning" (arXiv 2209.05433); row-wise scales as in fbgemm's
``quantize_fp8_per_row``.
"""

from collections.abc import Sequence

import torch

from engine.kernels.encoded_linear import Encoding
from engine.parameter import ParameterBuilder
from engine.quantization.matrix import MatrixPart
from engine.quantization.online import quantize_while_loading
from engine.quantization.row_scaled import RowScaledMatrix
from engine.quantization_config import MatrixFormat

_LARGEST = 448.0
"""e4m3's largest number."""
_MULTIPLE = 16
"""Of both sizes of a matrix, which the GPU's operation asks for."""


class Float8Matrix(RowScaledMatrix):
    """On NVIDIA GPUs from Hopper on, bfloat16 activations are quantized too, with a scale for each token, and both are
    multiplied in float8."""

    def __init__(self, build: ParameterBuilder, parts: Sequence[MatrixPart], form: MatrixFormat) -> None:
        super().__init__(build, parts, Encoding.FLOAT8)
        self._input_bound = form.input_bound
        self._is_fast = (
            build.device.type == "cuda"
            and torch.cuda.get_device_capability(build.device) >= (9, 0)
            and self.num_outputs % _MULTIPLE == self.num_inputs % _MULTIPLE == 0
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._is_fast and hidden.dtype == torch.bfloat16:
            return multiply_float8(hidden, self.codes, self.scales, self._input_bound)
        return super().forward(hidden)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return decode_e4m3(codes)


class Fp8Matrix(Float8Matrix):
    """As the checkpoint holds it."""

    def __init__(self, build: ParameterBuilder, parts: Sequence[MatrixPart], form: MatrixFormat) -> None:
        super().__init__(build, parts, form)
        self.fill_from(build, parts, form.scale_per_row, "weight_scale")


class OnlineFp8Matrix(Float8Matrix):
    """Quantized while loading, row by row."""

    def __init__(self, build: ParameterBuilder, parts: Sequence[MatrixPart], form: MatrixFormat) -> None:
        super().__init__(build, parts, form)
        quantize_while_loading(build, parts, [self.codes, self.scales], quantize_rows)


def quantize_rows(values: torch.Tensor, bound: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, in] to codes [n, in] and scales [n, 1] float32: each row's largest number becomes e4m3's largest.

    ``bound``: rows are scaled as if nothing in them were larger; what is, is cut off.
    """
    peaks = values.abs().amax(dim=1, keepdim=True).float()
    if bound is not None:
        peaks = peaks.clamp(max=bound)
    scales = peaks / _LARGEST
    scales = scales.masked_fill(scales == 0, 1.0)
    return (values / scales).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn), scales


def multiply_float8(
    hidden: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bound: float | None = None
) -> torch.Tensor:
    """[T, in] bfloat16 to [T, out], both sides in float8. ``bound``: see ``quantize_rows``."""
    inputs, input_scales = quantize_rows(hidden, bound)
    return torch._scaled_mm(inputs, codes.t(), scale_a=input_scales, scale_b=scales.t(), out_dtype=hidden.dtype)


def decode_e4m3(codes: torch.Tensor) -> torch.Tensor:
    """Finite float8 numbers as bfloat16, exactly; several times as fast on CPUs as torch's own conversion.

    Sign, exponent and mantissa are moved to where bfloat16 has them; the product makes up for the two formats'
    different exponent biases, and is right for subnormal numbers as well.
    """
    bits = codes.view(torch.int8).to(torch.int16)
    bits <<= 4
    bits &= ~0x7FFF | 0x07F0
    return bits.view(torch.bfloat16).mul_(2.0**120)
