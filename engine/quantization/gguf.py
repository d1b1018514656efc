"""Matrices held as the blocks of a GGUF file."""

from collections.abc import Sequence

import torch

from engine.errors import LayoutError
from engine.gguf.block_types import QUANTIZED_TYPES
from engine.kernels.encoded_linear import EncodedMatrix, Encoding
from engine.parameter import ParameterBuilder
from engine.quantization.gguf_blocks import dequantize
from engine.quantization.matrix import MatrixPart, WeightMatrix
from engine.quantization_config import MatrixFormat


class GgufMatrix(WeightMatrix):
    """Rows of blocks: uint8 [local out, bytes of a row]. ``rows`` decodes those asked for, in float32."""

    def __init__(self, build: ParameterBuilder, parts: Sequence[MatrixPart], form: MatrixFormat) -> None:
        super().__init__(build, parts)
        self._type = QUANTIZED_TYPES[form.gguf_type]
        for part in parts:
            self._check_cut(build.prefix, part)
        self.weight = build.empty(self.num_outputs, self._type.num_bytes(self.num_inputs), dtype=torch.uint8)
        for part, rows in zip(parts, self.weight.split([part.local_outputs for part in parts]), strict=True):
            row, column = part.start
            shape = (part.num_outputs, self._type.num_bytes(part.num_inputs))
            build.fill(rows, f"{part.name}.weight", shape, (row, self._type.num_bytes(column)))

    def _check_cut(self, prefix: str, part: MatrixPart) -> None:
        """Raises LayoutError where a rank's inputs are no whole blocks."""
        if part.local_inputs % self._type.block_elements:
            raise LayoutError(
                f"{prefix}{part.name} is in {self._type.name}, which keeps {self._type.block_elements} inputs "
                f"together: its {part.num_inputs} inputs cannot be divided over {part.inputs.degree} ranks; "
                "use a smaller tp"
            )

    def encoded(self) -> EncodedMatrix:
        return EncodedMatrix(Encoding[self._type.name], self.num_inputs, self.weight, self._type.block_elements)

    def rows(self, index: slice | torch.Tensor) -> torch.Tensor:
        rows = self.weight[index]
        values = dequantize(rows.reshape(-1, self._type.block_bytes), self._type.name)
        return values.view(rows.shape[0], self.num_inputs).to(self.dtype)
