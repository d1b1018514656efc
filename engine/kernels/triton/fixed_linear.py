"""Matrix products by weights in which a number depends on its own rows alone, however many there are: one configuration
for all sizes, each sum in the order of the inputs, never divided among programs. For deterministic mode."""

import torch
import triton
import triton.language as tl

from engine.kernels.triton.launch import cdiv, dot_dtype

_ROWS, _COLUMNS, _INPUTS = 32, 64, 64


def fixed_linear(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``hidden`` [T, in] times the transpose of ``weight`` [out, in], with float32 sums: [T, out]. bfloat16 or float32,
    both alike; float32 is not rounded to TF32."""
    return fixed_linears(hidden[None], weight[None])[0]


def fixed_linears(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The same B times: [B, T, in] by [B, out, in] to [B, T, out]."""
    hidden, weight = hidden.contiguous(), weight.contiguous()
    (num_products, num_tokens, num_inputs), num_outputs = hidden.shape, weight.shape[1]
    output = hidden.new_empty(num_products, num_tokens, num_outputs)
    grid = cdiv(num_outputs, _COLUMNS), cdiv(num_tokens, _ROWS), num_products
    _fixed_linear[grid](
        hidden,
        weight,
        output,
        num_tokens,
        num_inputs,
        num_outputs,
        DOT=dot_dtype(hidden.dtype),
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        INPUTS=_INPUTS,
    )
    return output


@triton.jit(do_not_specialize=["num_tokens", "num_inputs", "num_outputs"])
def _fixed_linear(
    hidden: tl.tensor,
    weight: tl.tensor,
    output: tl.tensor,
    num_tokens: tl.tensor,
    num_inputs: tl.tensor,
    num_outputs: tl.tensor,
    DOT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INPUTS: tl.constexpr,
) -> None:
    # Not specialised: a kernel compiled for one token, or for multiples of 16, could add up in another order.
    product = tl.program_id(2).to(tl.int64)
    hidden += product * num_tokens * num_inputs
    weight += product * num_outputs * num_inputs
    output += product * num_tokens * num_outputs
    columns = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    rows = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, num_inputs, INPUTS):
        inputs = start + tl.arange(0, INPUTS)
        is_input = inputs < num_inputs
        left = tl.load(
            hidden + rows[:, None] * num_inputs + inputs[None, :],
            mask=(rows[:, None] < num_tokens) & is_input[None, :],
            other=0.0,
        )
        right = tl.load(
            weight + columns[None, :] * num_inputs + inputs[:, None],
            mask=(columns[None, :] < num_outputs) & is_input[:, None],
            other=0.0,
        )
        sums = tl.dot(left.to(DOT), right.to(DOT), sums, input_precision="ieee")
    is_output = (rows[:, None] < num_tokens) & (columns[None, :] < num_outputs)
    target = output + rows[:, None] * num_outputs + columns[None, :]
    tl.store(target, sums.to(output.dtype.element_ty), mask=is_output)
