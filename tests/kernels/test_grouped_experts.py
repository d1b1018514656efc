"""Grouped products of sorted pairs, by the operation of torch that CUDA devices use too, against float64."""

import pytest
import torch
from torch.nn import functional

from engine.kernels.gpu_experts import grouped_experts

E, SIZE, WIDTH = 5, 64, 32


@pytest.mark.parametrize(("first", "num_local"), [(0, 5), (2, 2)], ids=["all here", "two here"])
@pytest.mark.parametrize("scales_inputs", [True, False], ids=["inputs", "outputs"])
def test_equals_float64(first: int, num_local: int, scales_inputs: bool) -> None:
    """One expert has no tokens."""
    num_tokens, num_choices = 40, 2
    hidden = torch.randn(num_tokens, SIZE).bfloat16()
    gate_up = (torch.randn(E, 2 * WIDTH, SIZE) / SIZE**0.5).bfloat16()
    down = (torch.randn(E, SIZE, WIDTH) / WIDTH**0.5).bfloat16()
    ids = torch.stack([torch.randperm(E - 1)[:num_choices] for _ in range(num_tokens)])
    scores = torch.rand(num_tokens, num_choices)
    local = slice(first, first + num_local)

    found = grouped_experts(hidden, ids, scores, gate_up[local], down[local], first, scales_inputs=scales_inputs)

    expected = torch.zeros(num_tokens, SIZE, dtype=torch.float64)
    for token, choices in enumerate(ids.tolist()):
        for choice, expert in enumerate(choices):
            if first <= expert < first + num_local:
                score = scores[token, choice].double()
                x = hidden[token].double() * (score if scales_inputs else 1)
                gate, up = (gate_up[expert].double() @ x).chunk(2)
                y = down[expert].double() @ (functional.silu(gate) * up)
                expected[token] += y * (1 if scales_inputs else score)
    torch.testing.assert_close(found.double(), expected, atol=0.03, rtol=0.02)
