"""Matrices of one byte a weight with a scale for each row."""

import abc
from collections.abc import Sequence

import torch

from engine.kernels.encoded_linear import EncodedMatrix, Encoding
from engine.parameter import ParameterBuilder
from engine.quantization.matrix import MatrixPart, WeightMatrix, multiply_by_tiles
from engine.quantization.online import FLOAT_FORMATS

_CODES = {Encoding.FLOAT8: torch.float8_e4m3fn, Encoding.INT8: torch.int8}


class RowScaledMatrix(WeightMatrix):
    """weight = code × its row's scale. ``codes``: [out, in] of one byte. ``scales``: [out, 1] float32.

    Activations are multiplied as they come: a checkpoint's wish that they be quantized too is met only where that is
    what makes a faster operation.
    """

    def __init__(self, build: ParameterBuilder, parts: Sequence[MatrixPart], encoding: Encoding) -> None:
        super().__init__(build, parts)
        self._encoding = encoding
        self.codes = build.empty(self.num_outputs, self.num_inputs, dtype=_CODES[encoding])
        self.scales = build.empty(self.num_outputs, 1, dtype=torch.float32)

    def rows(self, index: slice | torch.Tensor) -> torch.Tensor:
        return self.decode(self.codes[index]).float().mul_(self.scales[index]).to(self.dtype)

    def encoded(self) -> EncodedMatrix:
        scales = self.output_scales().flatten()
        return EncodedMatrix(self._encoding, self.num_inputs, self.codes, self.num_inputs, output_scales=scales)

    def multiply(self, hidden: torch.Tensor) -> torch.Tensor:
        """In float32 by the exact weights. In bfloat16, which holds every code exactly but not every weight, the
        outputs are scaled instead, as the kernel does too."""
        if hidden.dtype == torch.float32:
            return super().multiply(hidden)
        return (self.multiply_codes(hidden) * self.output_scales()).to(hidden.dtype)

    @abc.abstractmethod
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes as bfloat16 numbers, exactly."""

    def multiply_codes(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, in] bfloat16 to [T, out] bfloat16, without the scales."""
        return multiply_by_tiles(hidden, self.num_outputs, lambda tile: self.decode(self.codes[tile]))

    def output_scales(self) -> torch.Tensor:
        """[1, out] float32."""
        return self.scales.t()

    def fill_from(
        self, build: ParameterBuilder, parts: Sequence[MatrixPart], scale_per_row: bool, scale_name: str
    ) -> None:
        """Codes from ``<part>.weight``, scales from ``<part>.<scale_name>``: [o, 1], or one number for the part."""
        sizes = [part.local_outputs for part in parts]
        for part, codes, scales in zip(parts, self.codes.split(sizes), self.scales.split(sizes), strict=True):
            build.fill(codes, f"{part.name}.weight", (part.num_outputs, part.num_inputs), part.start)
            name = f"{part.name}.{scale_name}"
            if scale_per_row:
                build.fill(scales, name, (part.num_outputs, 1), (part.start[0], 0))
            else:
                source = build.source(name, (1,), (0,), (1,), FLOAT_FORMATS, ((),))
                build.convert([source], [scales], _Spread(scales))


class _Spread:
    """Gives one number to every row."""

    def __init__(self, destination: torch.Tensor) -> None:
        self._destination = destination

    def __call__(self, value: torch.Tensor) -> None:
        self._destination.copy_(value)
