"""Layers' matrices as native code takes them."""

import torch

from engine.kernels.native_matrix import NativeMatrix, native_matrix
from engine.layers.linear import ColumnParallelLinear, RowParallelLinear
from engine.quantization.dense import DenseMatrix
from engine.quantization.matrix import WeightMatrix


def native_linears(
    *linears: ColumnParallelLinear | RowParallelLinear,
) -> list[tuple[NativeMatrix, list[torch.Tensor]]] | None:
    """Their matrices, and the tensors that these point to; None where one has a bias or another form."""
    if any(linear.bias is not None for linear in linears):
        return None
    found = [_matrix(linear.matrix) for linear in linears]
    native = [(matrix, tensors) for matrix, tensors in found if matrix is not None]
    return native if len(native) == len(linears) else None


def _matrix(matrix: WeightMatrix) -> tuple[NativeMatrix | None, list[torch.Tensor]]:
    """And the tensors that it points to."""
    if isinstance(matrix, DenseMatrix):
        return native_matrix(matrix.weight, None), [matrix.weight]
    codes = matrix.int8_codes()
    return (None, []) if codes is None else (native_matrix(*codes), list(codes))
