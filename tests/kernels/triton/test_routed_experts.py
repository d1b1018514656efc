"""Routed experts of few tokens against float64, token by token."""

import pytest
import torch

from engine.kernels import gpu_experts
from engine.kernels.triton.routed_experts import routed_experts
from tests.kernels.triton import references as expected
from tests.kernels.triton.references import DEVICE, check_close, randn

E = 6


def right(
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    scores: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    first: int,
    scales_inputs: bool,
) -> torch.Tensor:
    result = torch.zeros(hidden.shape, dtype=torch.float64, device=DEVICE)
    for token, choices in enumerate(expert_ids.tolist()):
        for choice, expert in enumerate(choices):
            if not first <= expert < first + len(down):
                continue
            score = scores[token, choice].double()
            x = hidden[token].double() * (score if scales_inputs else 1)
            gate, up = (gate_up[expert - first].double() @ x).chunk(2)
            y = down[expert - first].double() @ expected.swiglu(gate, up)
            result[token] += y * (1 if scales_inputs else score)
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("scales_inputs", [True, False], ids=["inputs", "outputs"])
@pytest.mark.parametrize(("num_tokens", "num_choices"), [(1, 1), (1, 3), (3, 2), (20, 1), (21, 2)])
def test_equals_float64(dtype: torch.dtype, scales_inputs: bool, num_tokens: int, num_choices: int) -> None:
    """More pairs than experts and fewer, one expert with more tokens than a tile, sizes that fill no tile."""
    size, width = 72, 40
    hidden = randn(num_tokens, size, dtype=dtype)
    gate_up = randn(E, 2 * width, size, dtype=dtype) / size**0.5
    down = randn(E, size, width, dtype=dtype) / width**0.5
    expert_ids = torch.stack([torch.randperm(E)[:num_choices] for _ in range(num_tokens)]).to(DEVICE)
    if num_choices == 1:
        expert_ids[num_tokens // 6 :] = 4
    scores = torch.rand(num_tokens, num_choices, device=DEVICE)
    arguments = (hidden, expert_ids, scores, gate_up, down)
    found = routed_experts(*arguments, 0, scales_inputs=scales_inputs)
    check_close(found, right(*arguments, 0, scales_inputs), num_roundings=4)


@pytest.mark.parametrize("num_tokens", [1, 9])
def test_experts_elsewhere_add_nothing(num_tokens: int) -> None:
    """This rank has experts 2 and 3 of 6."""
    hidden = randn(num_tokens, 32, dtype=torch.float32)
    gate_up, down = randn(2, 2 * 16, 32, dtype=torch.float32), randn(2, 32, 16, dtype=torch.float32)
    expert_ids = torch.stack([torch.randperm(E)[:3] for _ in range(num_tokens)]).to(DEVICE)
    scores = torch.rand(num_tokens, 3, device=DEVICE)
    arguments = (hidden, expert_ids, scores, gate_up, down)
    found = routed_experts(*arguments, 2, scales_inputs=False)
    check_close(found, right(*arguments, 2, False))


def test_rows_that_are_sorted_already(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes from other ranks belongs to one expert a row; an expert may get none."""
    monkeypatch.setattr(gpu_experts, "runs_on_gpu", lambda tensor: True)
    counts = torch.tensor([3, 0, 7, 1], device=DEVICE)
    tokens = randn(11, 32, dtype=torch.float32)
    gate_up, down = randn(4, 2 * 16, 32, dtype=torch.float32), randn(4, 32, 16, dtype=torch.float32)
    found = gpu_experts.gpu_sorted_experts(tokens, counts, gate_up, down)
    assert found is not None
    expert_ids = torch.tensor([[0]] * 3 + [[2]] * 7 + [[3]], device=DEVICE)
    check_close(found, right(tokens, expert_ids, torch.ones(11, 1), gate_up, down, 0, False))
    assert gpu_experts.gpu_sorted_experts(tokens[:0], counts * 0, gate_up, down) is None
