"""Requests of two adapters and of none, mixed in one step, get the logits that PEFT computes for each alone."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.lora.adapters import load_base, oracle_logits
from tests.lora.mixed import Adapted, mixed_logits
from tests.support.conformance import Conforms
from tests.support.rank_pool import run_ranks

TITLES = {"llama": "Llama", "llama4": "Llama 4", "mixtral": "Mixtral"}
LAYOUTS = [
    ("llama", 1, 1),
    ("llama", 2, 1),
    ("llama", 4, 1),
    ("llama4", 1, 1),
    ("llama4", 2, 1),
    ("llama4", 4, 2),
    ("mixtral", 1, 1),
    ("mixtral", 2, 2),
    pytest.param("llama4", 2, 2, marks=pytest.mark.full),
    pytest.param("llama4", 4, 4, marks=pytest.mark.full),
    pytest.param("mixtral", 2, 1, marks=pytest.mark.full),
]


@pytest.mark.parametrize(("name", "tp", "ep"), LAYOUTS)
def test_mixed_adapters(adapted: Callable[[str], Adapted], conforms: Conforms, name: str, tp: int, ep: int) -> None:
    conforms(TITLES[name], "float32 + 2 adapters", tp=tp, ep=ep, oracle="PEFT")
    made = adapted(name)
    ours = mixed_logits(None, made, 1, 1) if tp == 1 else run_ranks(mixed_logits, tp, made, tp, ep)[0]
    for which, expected in made.logits.items():
        assert expected.std() >= 1.0, "an absolute tolerance means little on smaller logits"
        np.testing.assert_allclose(ours[which], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "tp"), [("llama", 1), ("llama4", 2)])
def test_each_stage_loads_its_part_of_an_adapter(
    adapted: Callable[[str], Adapted], conforms: Conforms, name: str, tp: int
) -> None:
    conforms(TITLES[name], "float32 + 2 adapters", pp=2, tp=tp, oracle="PEFT")
    made = adapted(name)
    ours = run_ranks(mixed_logits, 2 * tp, made, tp, 1, 2)[tp]
    for which, expected in made.logits.items():
        np.testing.assert_allclose(ours[which], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "tp", "ep"), [("llama4", 1, 2), ("mixtral", 2, 2)])
def test_adapters_travel_with_their_tokens(
    adapted: Callable[[str], Adapted], conforms: Conforms, name: str, tp: int, ep: int
) -> None:
    """To experts on ranks of another dp group."""
    conforms(TITLES[name], "float32 + 2 adapters", dp=2, tp=tp, ep=ep, oracle="PEFT")
    made = adapted(name)
    ranks = run_ranks(mixed_logits, 2 * tp, made, tp, ep, 1, 2)
    assert set(ranks[0]) == {None, 0, 1} and set(ranks[tp]) == {0, 1}
    for ours in (ranks[0], ranks[tp]):
        for which, logits in ours.items():
            np.testing.assert_allclose(logits, made.logits[which], rtol=0, atol=1e-4)


def test_experts_adapted_one_by_one(adapted: Callable[[str], Adapted], tmp_path: Path) -> None:
    """As PEFT wrote it for transformers 4, where each expert's matrices were modules; the oracle has them merged."""
    made = adapted("mixtral")
    oracle = load_base(made.base)
    generator = torch.Generator().manual_seed(2)
    tensors: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for layer, module in enumerate(oracle.model.layers):
            experts = module.mlp.experts
            for expert in range(4):
                gate, up = experts.gate_up_proj[expert].chunk(2)
                for name, weight in (("w1", gate), ("w3", up), ("w2", experts.down_proj[expert])):
                    a = torch.randn(3, weight.shape[1], generator=generator) * 0.1
                    b = torch.randn(weight.shape[0], 3, generator=generator) * 0.1
                    prefix = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                    tensors |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
                    weight.add_(b @ a, alpha=2.0)
        text = made.texts[0]
        expected = oracle(torch.tensor([text])).logits[0].numpy()
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 3, "lora_alpha": 6}')
    assert np.abs(expected - oracle_logits(made.base, None, text)).mean() > 0.3
    changed = dataclasses.replace(made, adapters=(tmp_path, made.adapters[1]))
    ours = run_ranks(mixed_logits, 2, changed, 2, 2)[0]
    np.testing.assert_allclose(ours[0], expected, rtol=0, atol=1e-4)
