"""What is read from config.json in both of its forms, KV groups, and which layouts are refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from engine.config import Dtype, ParallelConfig
from engine.errors import CheckpointError, LayoutError
from engine.layer_config import QkNorm
from engine.model_config import (
    PLAN_ONLY_ARCHITECTURES,
    ModelConfig,
    kv_groups,
    num_local_kv_heads,
    validate_layout,
)
from engine.rope_config import RopeType

MODELS = Path(__file__).parents[1] / "data" / "models"

LLAMA_V4: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "eos_token_id": [3, 4],
    "bos_token_id": 2,
}


def hub_config(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((MODELS / f"{name}.json").read_text())
    return content


def test_both_forms_of_a_llama_config_are_equal() -> None:
    new = {key: value for key, value in LLAMA_V4.items() if key not in ("torch_dtype", "rope_theta", "rope_scaling")}
    new["dtype"] = "bfloat16"
    new["rope_parameters"] = {**LLAMA_V4["rope_scaling"], "rope_theta": LLAMA_V4["rope_theta"]}
    config = ModelConfig.from_hf(LLAMA_V4)
    assert config == ModelConfig.from_hf(new)
    assert (config.rope.kind, config.rope.factor, config.rope.theta) == (RopeType.LLAMA3, 32.0, 500000.0)
    assert config.rope.original_max_positions == 64
    assert config.dtype is Dtype.BFLOAT16


def test_transformers_own_rewriting_of_a_hub_config_means_the_same(tmp_path: Path) -> None:
    """The v5 form as transformers itself writes it: explicit moe_layers, layer_types and no_rope_layers."""
    transformers = pytest.importorskip("transformers")
    for name in ("Llama-4-Scout-17B-16E-Instruct", "Llama-4-Maverick-17B-128E-Instruct"):
        old = {**hub_config(name)["text_config"], "architectures": ["Llama4ForCausalLM"]}
        assert old["no_rope_layers"] == []
        transformers.Llama4TextConfig(**old).save_pretrained(tmp_path)
        assert "rope_parameters" in json.loads((tmp_path / "config.json").read_text())
        assert ModelConfig.from_directory(tmp_path) == ModelConfig.from_hf(old)


def test_llama4_layers() -> None:
    config = ModelConfig.from_hf(hub_config("Llama-4-Maverick-17B-128E-Instruct"))
    assert config.num_layers == 48
    assert [i for i, layer in enumerate(config.layers) if layer.moe] == list(range(1, 48, 2))
    assert [i for i, layer in enumerate(config.layers) if not layer.use_rope] == list(range(3, 48, 4))
    for layer in config.layers:
        assert layer.chunk_size == (8192 if layer.use_rope else None)
        assert (layer.temperature is None) == layer.use_rope
        assert not layer.qk_norm
    assert config.layers[0].intermediate_size == 16384
    assert config.layers[1].moe and config.layers[1].moe.intermediate_size == 8192
    assert config.tensor_prefix == "language_model."
    assert config.rope.kind is RopeType.DEFAULT and config.rope.interleaved
    assert config.eos_token_ids == (200001, 200007, 200008)


def test_scout_norms_queries_in_rope_layers_only() -> None:
    config = ModelConfig.from_hf(hub_config("Llama-4-Scout-17B-16E-Instruct"))
    assert all(layer.moe for layer in config.layers)
    assert all((layer.qk_norm is QkNorm.UNWEIGHTED_AFTER_ROPE) == layer.use_rope for layer in config.layers)
    assert config.rope.low_freq_factor == config.rope.high_freq_factor == 1.0


def test_explicit_layer_lists_win() -> None:
    text = hub_config("Llama-4-Scout-17B-16E-Instruct")["text_config"] | {"num_hidden_layers": 3}
    text |= {"architectures": ["Llama4ForCausalLM"], "moe_layers": [2], "no_rope_layers": [0, 1, 1]}
    text |= {"layer_types": ["full_attention", "full_attention", "chunked_attention"]}
    layers = ModelConfig.from_hf(text).layers
    assert [bool(layer.moe) for layer in layers] == [False, False, True]
    assert [layer.use_rope for layer in layers] == [False, True, True]
    assert [layer.chunk_size for layer in layers] == [None, None, 8192]
    with pytest.raises(CheckpointError, match="no_rope_layers has 2 entries; it must have 3"):
        ModelConfig.from_hf(text | {"no_rope_layers": [0, 1]})


def test_no_chunk_size_means_full_attention() -> None:
    text = hub_config("Llama-4-Scout-17B-16E-Instruct")["text_config"] | {"attention_chunk_size": None}
    config = ModelConfig.from_hf(text | {"architectures": ["Llama4ForCausalLM"]})
    assert {layer.chunk_size for layer in config.layers} == {None}
    assert len(kv_groups(config)) == 1


def test_end_tokens_of_both_files_count(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_V4))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 3], "bos_token_id": 7}))
    config = ModelConfig.from_directory(tmp_path)
    assert config.eos_token_ids == (9, 3, 4)
    assert config.bos_token_id == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel'; served are Llama4ForCausalLM, Llama4For"),
        ({"quantization_config": {"quant_method": "quip"}}, "quantized by quip; served are awq"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope'; served are default, linear"),
        ({"rope_scaling": {"type": "linear"}}, "'linear' needs 'factor'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"vocab_size": None}, "vocab_size"),
    ],
)
def test_what_is_not_served_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    config = {key: value for key, value in (LLAMA_V4 | change).items() if value is not None}
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_hf(config)


def test_broken_or_missing_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no config.json"):
        ModelConfig.from_directory(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        ModelConfig.from_directory(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="JSON object"):
        ModelConfig.from_directory(tmp_path)


@pytest.mark.parametrize("name", sorted(path.stem for path in MODELS.glob("*.json") if path.stem != "params"))
def test_every_hub_config_is_served_or_refused_by_name(name: str) -> None:
    content = hub_config(name)
    architecture = content["architectures"][0]
    if architecture in PLAN_ONLY_ARCHITECTURES:
        with pytest.raises(CheckpointError, match=f"{architecture} is not served: remuda plan knows its shapes"):
            ModelConfig.from_hf(content)
    else:
        validate_layout(ModelConfig.from_hf(content), ParallelConfig(tp=4))


def test_kv_groups_are_equally_large_and_full_layers_come_first() -> None:
    config = ModelConfig.from_hf(hub_config("Llama-4-Scout-17B-16E-Instruct"))
    groups = kv_groups(config)
    assert [(len(group.layers), group.chunk_size) for group in groups] == [(12, None), *[(12, 8192)] * 3]
    assert groups[0].layers == tuple(range(3, 48, 4))
    assert sorted(layer for group in groups for layer in group.layers) == list(range(48))


def test_kv_groups_take_the_greatest_common_divisor() -> None:
    text = hub_config("Llama-4-Scout-17B-16E-Instruct")["text_config"]
    for count in (6, 7, 10):
        config = ModelConfig.from_hf(text | {"architectures": ["Llama4ForCausalLM"], "num_hidden_layers": count})
        num_full = sum(layer.chunk_size is None for layer in config.layers)
        assert {len(group.layers) for group in kv_groups(config)} == {math.gcd(num_full, count - num_full)}
    assert [group.layers for group in kv_groups(ModelConfig.from_hf(LLAMA_V4))] == [(0, 1)]


def test_kv_heads_are_replicated_over_more_ranks() -> None:
    config = ModelConfig.from_hf(LLAMA_V4)
    assert [num_local_kv_heads(config, ParallelConfig(tp=tp)) for tp in (1, 2, 4, 8)] == [2, 1, 1, 1]
    for tp in (1, 2, 4, 8):
        validate_layout(config, ParallelConfig(tp=tp))


@pytest.mark.parametrize(
    ("change", "layout", "message"),
    [
        ({}, {"tp": 3}, "tp=3 does not divide the model's 8 attention heads"),
        ({"num_attention_heads": 12, "num_key_value_heads": 3}, {"tp": 2}, "3 key-value heads"),
        ({"num_attention_heads": 12, "num_key_value_heads": 3}, {"tp": 4}, "3 key-value heads"),
        ({"intermediate_size": 98}, {"tp": 4}, "feed-forward width 98"),
        ({}, {"tp": 2, "ep": 2}, "ep=2 needs a mixture of experts"),
        ({}, {"pp": 2}, "pp=2 is not supported yet"),
        ({}, {"dp": 2}, "dp=2 is not supported yet"),
    ],
)
def test_illegal_layouts_of_a_dense_model(change: dict[str, Any], layout: dict[str, int], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        validate_layout(ModelConfig.from_hf(LLAMA_V4 | change), ParallelConfig(**layout))


@pytest.mark.parametrize(
    ("change", "layout", "message"),
    [
        ({"num_local_experts": 6}, {"tp": 4, "ep": 4}, "ep=4 does not divide the model's 6 experts"),
        ({"intermediate_size": 50}, {"tp": 4, "ep": 2}, "feed-forward width 50"),
        ({"intermediate_size_mlp": 50, "interleave_moe_layer_step": 2}, {"tp": 4}, "feed-forward width 50"),
    ],
)
def test_illegal_layouts_of_a_mixture(change: dict[str, Any], layout: dict[str, int], message: str) -> None:
    text = hub_config("Llama-4-Scout-17B-16E-Instruct")["text_config"] | {"architectures": ["Llama4ForCausalLM"]}
    with pytest.raises(LayoutError, match=message):
        validate_layout(ModelConfig.from_hf(text | change), ParallelConfig(**layout))


def test_ep_must_divide_the_ranks() -> None:
    with pytest.raises(LayoutError, match="ep=3 does not divide 1 × 4"):
        ParallelConfig(tp=4, ep=3)
