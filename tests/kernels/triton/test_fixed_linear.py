"""The product whose numbers depend on their own rows alone."""

import pytest
import torch

from engine.kernels.triton.fixed_linear import fixed_linear
from tests.kernels.triton.references import check_close, randn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("num_inputs", "num_outputs"), [(64, 128), (100, 70)])
def test_products_are_right_and_depend_on_their_rows_alone(
    dtype: torch.dtype, num_inputs: int, num_outputs: int
) -> None:
    hidden, weight = randn(45, num_inputs, dtype=dtype), randn(num_outputs, num_inputs, dtype=dtype)
    whole = fixed_linear(hidden, weight)
    check_close(whole, hidden.double() @ weight.double().t())
    for first, last in ((0, 1), (7, 40), (44, 45)):
        assert torch.equal(fixed_linear(hidden[first:last], weight), whole[first:last])
    for first, last in ((3, 4), (9, num_outputs)):
        assert torch.equal(fixed_linear(hidden, weight[first:last]), whole[:, first:last])
