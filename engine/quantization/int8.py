"""int8 with a scale for each row or tensor: compressed-tensors' int-quantized, bitsandbytes' ("LLM.int8()", arXiv
2208.07339) and on the fly."""

from collections.abc import Sequence

import torch

from engine.kernels.encoded_linear import Encoding
from engine.kernels.linear import can_multiply_int8, linear_int8
from engine.parameter import ParameterBuilder
from engine.quantization.matrix import MatrixPart
from engine.quantization.online import quantize_while_loading
from engine.quantization.row_scaled import RowScaledMatrix
from engine.quantization_config import MatrixFormat

_LARGEST = 127.0
_MAX_FAST_TOKENS = 8
"""torch's operation reads each weight as a byte, but is slow for each token: converting a tile wins above."""
_FAST_INPUTS = 32
"""It takes whole vectors of inputs without asking whether there are any left (torch 2.13 reads past the end)."""


class SignedByteMatrix(RowScaledMatrix):
    """On a CPU with tile units, bfloat16 activations are rounded to int8 too where the format allows it; on others few
    tokens are multiplied by the bytes themselves."""

    def __init__(self, build: ParameterBuilder, parts: Sequence[MatrixPart], form: MatrixFormat) -> None:
        super().__init__(build, parts, Encoding.INT8)
        self._is_fast = build.device.type == "cpu" and self.num_inputs % _FAST_INPUTS == 0
        self._rounds_inputs = form.rounds_inputs and can_multiply_int8(self.codes, build.dtype)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._rounds_inputs and hidden.dtype == torch.bfloat16:
            return linear_int8(hidden, self.codes, self.scales)
        return super().forward(hidden)

    def int8_codes(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        return (self.codes, self.scales.flatten()) if self._rounds_inputs else None

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return codes.to(torch.bfloat16)

    def multiply_codes(self, hidden: torch.Tensor) -> torch.Tensor:
        if not self._is_fast or hidden.shape[0] > _MAX_FAST_TOKENS:
            return super().multiply_codes(hidden)
        # Its own scales would be rounded to bfloat16.
        ones = hidden.new_ones(self.num_outputs)
        product: torch.Tensor = torch.ops.aten._weight_int8pack_mm(hidden.contiguous(), self.codes, ones)
        return product


class Int8Matrix(SignedByteMatrix):
    """compressed-tensors' form."""

    def __init__(self, build: ParameterBuilder, parts: Sequence[MatrixPart], form: MatrixFormat) -> None:
        super().__init__(build, parts, form)
        self.fill_from(build, parts, form.scale_per_row, "weight_scale")


class BnbInt8Matrix(SignedByteMatrix):
    """bitsandbytes' form: ``scales`` are the rows' largest numbers (``SCB``), weight = code · scale / 127.

    Activations are never rounded, so there is no need to treat the outliers among them apart, as bitsandbytes does.
    """

    def __init__(self, build: ParameterBuilder, parts: Sequence[MatrixPart], form: MatrixFormat) -> None:
        super().__init__(build, parts, form)
        sizes = [part.local_outputs for part in parts]
        for part, codes, scales in zip(parts, self.codes.split(sizes), self.scales.split(sizes), strict=True):
            build.fill(codes, f"{part.name}.weight", (part.num_outputs, part.num_inputs), part.start)
            build.fill(scales[:, 0], f"{part.name}.SCB", (part.num_outputs,), (part.start[0],))

    def rows(self, index: slice | torch.Tensor) -> torch.Tensor:
        return (self.codes[index].float() * self.scales[index] * (1 / _LARGEST)).to(self.dtype)

    def output_scales(self) -> torch.Tensor:
        return self.scales.t() * (1 / _LARGEST)


class OnlineInt8Matrix(SignedByteMatrix):
    """Quantized while loading, row by row."""

    def __init__(self, build: ParameterBuilder, parts: Sequence[MatrixPart], form: MatrixFormat) -> None:
        super().__init__(build, parts, form)
        quantize_while_loading(build, parts, [self.codes, self.scales], quantize_rows)


def quantize_rows(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, in] float32 to codes [n, in] and scales [n, 1]: each row's largest number becomes 127 or -127."""
    peaks = values.abs().amax(dim=1, keepdim=True)
    peaks = peaks.masked_fill(peaks == 0, 1.0)
    return (values * (_LARGEST / peaks)).round().to(torch.int8), peaks / _LARGEST
