"""Shapes of the models that are planned and not served, and of vision parts, against transformers' own modules."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from engine.config import Dtype, ParallelConfig
from engine.model_config import PLAN_ONLY_ARCHITECTURES
from engine.models.shapes.registry import shapes_of
from engine.parallel.mesh import Mesh
from engine.weights.ledger import count_parameters, planned_bytes, stage_kv
from tests.plan.models import config_of, with_text

FEW_LAYERS = {"num_hidden_layers": 5, "cross_attention_layers": [1, 3]}
CASES = {
    "DeepseekV3ForCausalLM": with_text(config_of("DeepSeek-V3"), num_hidden_layers=5),
    "DeepseekV3ForCausalLM without a query latent": with_text(
        config_of("DeepSeek-V3"), num_hidden_layers=5, q_lora_rank=None, n_routed_experts=8, n_shared_experts=2
    ),
    "Gemma3ForConditionalGeneration": config_of("Gemma-3-27B"),
    "Gemma3ForCausalLM": {
        **config_of("Gemma-3-27B")["text_config"],
        "architectures": ["Gemma3ForCausalLM"],
        "num_hidden_layers": 7,
    },
    "MllamaForConditionalGeneration": config_of("Llama-3.2-11B-Vision-Instruct"),
    "MllamaForConditionalGeneration small": with_text(config_of("Llama-3.2-90B-Vision-Instruct"), **FEW_LAYERS),
    "Phi3ForCausalLM": config_of("Phi-4"),
    "Llama4ForConditionalGeneration": with_text(config_of("Llama-4-Scout-17B-16E-Instruct"), num_hidden_layers=4),
}


def reference(config: dict[str, Any]) -> nn.Module:
    """transformers' model on the meta device."""
    model_class = getattr(transformers, config["architectures"][0])
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    with torch.device("meta"):
        model: nn.Module = model_class(model_class.config_class.from_dict(plain))
    return model


def _checkpoint_shapes(model: nn.Module, is_fused: bool) -> Iterator[tuple[int, ...]]:
    """As a checkpoint stores them: most have a tensor for each expert, where transformers stacks them."""
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if ".experts." not in name or is_fused:
            yield shape
        elif "gate_up" in name:
            yield from [(shape[1] // 2, shape[2])] * (2 * shape[0])
        else:
            yield from [shape[1:]] * shape[0]


@pytest.mark.parametrize("case", sorted(CASES))
def test_every_tensor_of_transformers(case: str) -> None:
    config = CASES[case]
    theirs, ours = reference(config), shapes_of(config)
    built = ours.with_quantization(None).build(Mesh(), Dtype.BFLOAT16)
    # Fused parts are one parameter of ours: what they are filled from are the checkpoint's tensors.
    tensors = {piece.name: tuple(piece.shape) for piece in built.slices}
    expected = Counter(_checkpoint_shapes(theirs, is_fused="Llama4" in case))
    assert Counter([*tensors.values(), *ours.vision.values()]) == expected
    counts = count_parameters(ours)
    assert counts.total == sum(parameter.numel() for parameter in theirs.parameters())
    assert len(tensors) + len(ours.vision) == expected.total()


def test_the_planned_architectures_are_all_known() -> None:
    assert {case.split()[0] for case in CASES} >= set(PLAN_ONLY_ARCHITECTURES)


@pytest.mark.parametrize("case", sorted(CASES))
def test_stages_together_are_the_model(case: str) -> None:
    """A tied embedding stands in the first and the last stage; everything else once."""
    shapes = shapes_of(CASES[case]).with_quantization(None)
    whole = planned_bytes(shapes, Mesh(), Dtype.BFLOAT16).by_kind
    layout = ParallelConfig(pp=3)
    stages = [planned_bytes(shapes, Mesh(layout, rank), Dtype.BFLOAT16).by_kind for rank in range(3)]
    for kind in whole:
        together = sum(stage.get(kind, 0) for stage in stages)
        copies = 2 if kind == "embedding" and shapes.config.tie_word_embeddings else 3 if kind == "vision" else 1
        assert together == copies * whole[kind], kind
    cache = stage_kv(shapes, Mesh(), 16, Dtype.BFLOAT16)
    parts = [stage_kv(shapes, Mesh(layout, rank), 16, Dtype.BFLOAT16) for rank in range(3)]
    # Every layer that keeps something is in one group of one stage; all stages have the same groups.
    assert len({len(kv.groups) for kv in parts}) == 1
    layers = sorted(layer for kv in parts for group in kv.groups for layer in group.layers)
    assert layers == sorted(layer for group in cache.groups for layer in group.layers)
    for rank, kv in enumerate(parts):
        per_layer = cache.block_bytes // len(cache.groups[0].layers)
        assert kv.block_bytes == per_layer * max(len(group.layers) for group in kv.groups)
        assert all(layer in Mesh(layout, rank).layers(shapes.config) for group in kv.groups for layer in group.layers)


@pytest.mark.parametrize("case", ["DeepseekV3ForCausalLM", "Gemma3ForConditionalGeneration", "Phi3ForCausalLM"])
def test_ranks_together_are_the_model(case: str) -> None:
    """What is divided adds up; what every rank holds is there as often as there are ranks."""
    shapes = shapes_of(CASES[case]).with_quantization(None)
    whole = planned_bytes(shapes, Mesh(), Dtype.BFLOAT16).by_kind
    halves = [planned_bytes(shapes, Mesh(ParallelConfig(tp=2), rank), Dtype.BFLOAT16).by_kind for rank in range(2)]
    assert halves[0] == halves[1]
    for kind in ("embedding", "head", "experts"):
        assert 2 * halves[0].get(kind, 0) == whole.get(kind, 0)
    for kind in ("norm", "vision"):
        assert halves[0].get(kind, 0) == whole.get(kind, 0)
    if case != "DeepseekV3ForCausalLM":
        assert 2 * halves[0]["attention"] == whole["attention"]
        assert 2 * halves[0]["feed_forward"] == whole["feed_forward"]


def test_a_latent_cache_is_whole_on_every_rank() -> None:
    shapes = shapes_of(CASES["DeepseekV3ForCausalLM"])
    alone = stage_kv(shapes, Mesh(), 16, Dtype.BFLOAT16)
    assert alone == stage_kv(shapes, Mesh(ParallelConfig(tp=8), 3), 16, Dtype.BFLOAT16)
    assert alone.block_bytes == 5 * 16 * (512 + 64) * 2


def test_key_value_heads_are_repeated_where_ranks_are_more() -> None:
    shapes = shapes_of(config_of("Qwen3-30B-A3B"))
    halves = [stage_kv(shapes, Mesh(ParallelConfig(tp=tp)), 16, Dtype.BFLOAT16).block_bytes for tp in (1, 2, 4, 8, 16)]
    assert [halves[0] // part for part in halves] == [1, 2, 4, 4, 4]
