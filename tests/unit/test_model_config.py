"""What is read from config.json in both of its forms, KV groups, and which layouts are refused."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.config import Dtype, KvGroupConfig, ParallelConfig
from engine.errors import CheckpointError, LayoutError
from engine.layer_config import LayerConfig, QkNorm
from engine.model_config import (
    PLAN_ONLY_ARCHITECTURES,
    ModelConfig,
    kv_groups,
    num_local_kv_heads,
    validate_layout,
)
from engine.rope_config import RopeType

MODELS = Path(__file__).parents[1] / "data" / "models"

SERVED = sorted(
    path.stem
    for path in MODELS.glob("*.json")
    if path.stem != "params" and json.loads(path.read_text())["architectures"][0] not in PLAN_ONLY_ARCHITECTURES
)
CONFIG_CLASSES = {
    "LlamaForCausalLM": "LlamaConfig",
    "Llama4ForCausalLM": "Llama4TextConfig",
    "Llama4ForConditionalGeneration": "Llama4Config",
    "MistralForCausalLM": "MistralConfig",
    "MixtralForCausalLM": "MixtralConfig",
    "Qwen3ForCausalLM": "Qwen3Config",
    "Qwen3MoeForCausalLM": "Qwen3MoeConfig",
}

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


@pytest.mark.parametrize("name", SERVED)
def test_transformers_own_rewriting_of_a_hub_config_means_the_same(name: str, tmp_path: Path) -> None:
    """The v5 form as transformers itself writes it: rope_parameters, explicit lists of layers, num_local_experts."""
    transformers = pytest.importorskip("transformers")
    old = hub_config(name)
    # Quantization is written as it was read; Guard 4's null chunk breaks transformers.
    old = {key: value for key, value in old.items() if key != "quantization_config"}
    if name == "Llama-Guard-4-12B":
        old["text_config"] = old["text_config"] | {"interleave_moe_layer_step": 1}
    config_class = getattr(transformers, CONFIG_CLASSES[old["architectures"][0]])
    config_class.from_dict(old).save_pretrained(tmp_path)
    new = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in new.get("text_config", new)
    assert ModelConfig.from_directory(tmp_path) == ModelConfig.from_hf(old)


@pytest.mark.parametrize("architecture", CONFIG_CLASSES)
def test_what_transformers_assumes_is_assumed(architecture: str, tmp_path: Path) -> None:
    """A config.json that says next to nothing, against the same one with transformers' defaults written out."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 30, "num_attention_heads": 8}
    sizes |= {"num_key_value_heads": 8, "intermediate_size": 96, "intermediate_size_mlp": 96, "num_local_experts": 8}
    sizes |= {"moe_intermediate_size": 32}
    short: dict[str, Any] = {"architectures": [architecture]}
    if architecture == "Llama4ForConditionalGeneration":
        short |= {"text_config": sizes}
    else:
        short |= sizes
    getattr(transformers, CONFIG_CLASSES[architecture])(**short).save_pretrained(tmp_path)
    full = ModelConfig.from_directory(tmp_path)
    assert replace(ModelConfig.from_hf(short), bos_token_id=None, eos_token_ids=()) == replace(
        full, bos_token_id=None, eos_token_ids=()
    )


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


def test_vision_tensors_are_named_and_skipped() -> None:
    config = ModelConfig.from_hf(hub_config("Llama-4-Scout-17B-16E-Instruct"))
    assert config.skipped_prefixes == ("vision_model.", "multi_modal_projector.")
    assert config.notice and "only text is served" in config.notice and "vision_model.*" in config.notice
    text_only = hub_config("Llama-4-Scout-17B-16E-Instruct")["text_config"] | {"architectures": ["Llama4ForCausalLM"]}
    assert (ModelConfig.from_hf(text_only).skipped_prefixes, ModelConfig.from_hf(text_only).notice) == ((), None)


def test_llama_guard_4_is_dense_and_unchunked() -> None:
    config = ModelConfig.from_hf(hub_config("Llama-Guard-4-12B"))
    assert set(config.layers) == {LayerConfig(intermediate_size=8192)}
    assert config.num_experts == 0 and len(kv_groups(config)) == 1


def test_llama_1_has_neither_kv_heads_nor_theta() -> None:
    absent = ("num_key_value_heads", "rope_theta", "rope_scaling", "max_position_embeddings")
    old = {key: value for key, value in LLAMA_V4.items() if key not in absent}
    config = ModelConfig.from_hf(old | {"architectures": ["LLaMAForCausalLM"], "max_sequence_length": 1024})
    assert config.architecture == "LlamaForCausalLM"
    assert (config.num_kv_heads, config.max_position_embeddings, config.rope.theta) == (8, 1024, 10000.0)
    assert ModelConfig.from_hf(old).max_position_embeddings == 2048


MISTRAL = LLAMA_V4 | {"architectures": ["MistralForCausalLM"], "rope_scaling": None, "num_hidden_layers": 4}
QWEN3 = MISTRAL | {"architectures": ["Qwen3ForCausalLM"]}
QWEN3_MOE = MISTRAL | {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4, "moe_intermediate_size": 48}


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (MISTRAL | {"sliding_window": 32}, [32] * 4),
        (MISTRAL | {"sliding_window": None}, [None] * 4),
        (MISTRAL, [4096] * 4),
        (QWEN3 | {"sliding_window": 32, "max_window_layers": 3}, [None] * 4),
        (QWEN3 | {"sliding_window": 32, "max_window_layers": 3, "use_sliding_window": True}, [None] * 3 + [32]),
        (
            QWEN3
            | {"sliding_window": 32, "use_sliding_window": True}
            | {"layer_types": ["sliding_attention", "full_attention"] * 2},
            [32, None, 32, None],
        ),
        (QWEN3_MOE | {"sliding_window": 32}, [None] * 4),
        (QWEN3_MOE | {"sliding_window": 32, "use_sliding_window": True}, [32] * 4),
    ],
)
def test_windows(config: dict[str, Any], windows: list[int | None]) -> None:
    assert [layer.window_size for layer in ModelConfig.from_hf(config).layers] == windows


@pytest.mark.parametrize(
    ("change", "mixtures"),
    [
        ({}, [0, 1, 2, 3]),
        ({"decoder_sparse_step": 2}, [1, 3]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, [1]),
        ({"mlp_only_layers": [0, 2]}, [1, 3]),
        ({"num_experts": 0}, []),
    ],
)
def test_mixtures_of_qwen3(change: dict[str, Any], mixtures: list[int]) -> None:
    config = ModelConfig.from_hf(QWEN3_MOE | change)
    assert [i for i, layer in enumerate(config.layers) if layer.moe] == mixtures
    renamed = QWEN3_MOE | change
    renamed["num_local_experts"] = renamed.pop("num_experts")
    assert ModelConfig.from_hf(renamed) == config


def test_kv_groups_of_windows_and_full_layers() -> None:
    kinds = ["full_attention", "sliding_attention"] * 2
    config = ModelConfig.from_hf(QWEN3 | {"use_sliding_window": True, "sliding_window": 32, "layer_types": kinds})
    assert kv_groups(config) == (KvGroupConfig((0, 2)), KvGroupConfig((1, 3), window_size=32))
    assert kv_groups(ModelConfig.from_hf(MISTRAL)) == (KvGroupConfig((0, 1, 2, 3), window_size=4096),)


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
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "'GPT2LMHeadModel'; served are Llama4ForCausalLM, .*Qwen3MoeForCausalLM",
        ),
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
        ({"num_attention_heads": 12, "num_key_value_heads": 3, "head_dim": 8}, {"tp": 2}, "3 key-value heads"),
        ({"num_attention_heads": 12, "num_key_value_heads": 3, "head_dim": 8}, {"tp": 4}, "3 key-value heads"),
        ({"intermediate_size": 98}, {"tp": 4}, "feed-forward width 98"),
        ({}, {"tp": 2, "ep": 2}, "ep=2 needs a mixture of experts"),
        ({}, {"pp": 3}, "pp=3 is more than the model's 2 layers"),
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
        (
            {"architectures": ["MixtralForCausalLM"], "intermediate_size": 50},
            {"tp": 4},
            "dp × tp / ep = 1 × 4 / 1 = 4 does not divide the experts' width 50",
        ),
    ],
)
def test_illegal_layouts_of_a_mixture(change: dict[str, Any], layout: dict[str, int], message: str) -> None:
    text = hub_config("Llama-4-Scout-17B-16E-Instruct")["text_config"] | {"architectures": ["Llama4ForCausalLM"]}
    with pytest.raises(LayoutError, match=message):
        validate_layout(ModelConfig.from_hf(text | change), ParallelConfig(**layout))


def test_experts_without_a_shared_one_need_only_be_divided_as_experts_are() -> None:
    validate_layout(ModelConfig.from_hf(QWEN3_MOE | {"moe_intermediate_size": 49}), ParallelConfig(tp=4, ep=4))


def test_ep_must_divide_the_ranks() -> None:
    with pytest.raises(LayoutError, match="ep=3 does not divide 1 × 4"):
        ParallelConfig(tp=4, ep=3)
