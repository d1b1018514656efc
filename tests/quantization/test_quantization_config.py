"""Which matrices are quantized: as compressed-tensors and transformers themselves choose them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig as CompressedConfig
from compressed_tensors.quantization import apply_quantization_config
from hypothesis import given
from hypothesis import strategies as st
from transformers.quantizers.quantizers_utils import should_convert_module

from engine.errors import CheckpointError, InvalidOption
from engine.quantization_config import WeightFormat, online_quantization, parse_quantization

MODELS = Path(__file__).parents[1] / "data" / "models"
WEIGHTS = {"type": "float", "num_bits": 8, "strategy": "channel", "symmetric": True, "dynamic": False}
INT8 = WEIGHTS | {"type": "int"}
MAVERICK = "Llama-4-Maverick-17B-128E-Instruct-FP8.json"


def real_scheme(name: str) -> dict[str, Any]:
    scheme: dict[str, Any] = json.loads((MODELS / name).read_text())["quantization_config"]
    return scheme


def tiny_llama4() -> torch.nn.Module:
    """Llama 4 with vision, its experts one by one and its names as in the checkpoint that compressed-tensors wrote."""

    class Llama4TextAttention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                self.add_module(name, torch.nn.Linear(4, 4))

    def gated() -> torch.nn.Module:
        return torch.nn.ModuleDict({name: torch.nn.Linear(4, 4) for name in ("gate_proj", "up_proj", "down_proj")})

    feed_forward = torch.nn.ModuleDict(
        {
            "experts": torch.nn.ModuleList(gated() for _ in range(2)),
            "router": torch.nn.Linear(4, 2),
            "shared_expert": gated(),
        }
    )
    layer = torch.nn.ModuleDict({"self_attn": Llama4TextAttention(), "feed_forward": feed_forward})
    body = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([layer])})
    return torch.nn.ModuleDict(
        {
            "language_model": torch.nn.ModuleDict({"model": body, "lm_head": torch.nn.Linear(4, 4)}),
            "multi_modal_projector": torch.nn.ModuleDict({"linear_1": torch.nn.Linear(4, 4)}),
            "vision_model": torch.nn.ModuleDict({"patch_embedding": torch.nn.Linear(4, 4)}),
        }
    )


def assert_chosen_alike(scheme: dict[str, Any], model: torch.nn.Module) -> int:
    """Every linear module has the format that compressed-tensors gives it; returns how many have one."""
    apply_quantization_config(model, CompressedConfig.model_validate(scheme), show_progress=False)
    config = parse_quantization(scheme)
    num_quantized = 0
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        theirs = getattr(module, "quantization_scheme", None)
        ours = config.format_of(name)
        kind = None if theirs is None else {"float": WeightFormat.FP8, "int": WeightFormat.INT8}[theirs.weights.type]
        assert (None if ours is None else ours.kind) == kind, name
        num_quantized += ours is not None
    return num_quantized


def test_mavericks_own_list() -> None:
    """Experts and shared expert, not attention, router, head or vision."""
    assert assert_chosen_alike(real_scheme(MAVERICK), tiny_llama4()) == 9


@pytest.mark.parametrize(
    ("groups", "ignored"),
    [
        # A class or a parent's name ignores no matrix below it.
        ([(["Linear"], WEIGHTS)], ["Llama4TextAttention", "language_model.model.layers.0.self_attn", "lm_head"]),
        ([(["Linear"], WEIGHTS)], ["re:lm_head", "re:.*lm_head", "language_model.model.layers.0.self_attn.q_proj"]),
        # Names go before expressions, these before classes, whatever the order of the groups.
        ([(["Linear"], WEIGHTS), (["re:.*experts", "re:.*router$"], INT8)], []),
        ([(["re:.*proj$"], INT8), (["language_model.model.layers.0.self_attn.k_proj"], WEIGHTS)], []),
        ([(["re:.*down_proj"], WEIGHTS), (["re:.*experts"], INT8), (["Linear"], INT8)], ["re:vision"]),
        ([(["Embedding"], WEIGHTS), (["re:.*k_proj"], INT8)], []),
    ],
)
def test_targets_as_compressed_tensors_matches_them(groups: list[Any], ignored: list[str]) -> None:
    scheme = {
        "quant_method": "compressed-tensors",
        "format": "naive-quantized",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": {"targets": t, "weights": w} for i, (t, w) in enumerate(groups)},
        "ignore": ignored,
    }
    assert_chosen_alike(scheme, tiny_llama4())


def test_llama_405bs_own_list() -> None:
    """Every matrix of the 126 layers, quickly: hundreds of names are in the list."""
    scheme = real_scheme("Llama-3.1-405B-FP8.json")
    config = parse_quantization(scheme)
    assert config.name == "fp8 (fbgemm)"
    kinds = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    names = [f"model.layers.{layer}.{kind}" for layer in range(126) for kind in kinds]
    for name in names:
        form = config.format_of(name)
        assert (form is not None) == should_convert_module(name, scheme["modules_to_not_convert"])
        assert form is None or (form.kind is WeightFormat.FP8 and form.input_bound == 1200.0)
    assert sum(config.format_of(name) is not None for name in names) == 124 * 3


PARTS = st.sampled_from(["model", "layers", "0", "1", "11", "mlp", "gate", "gate_proj", "up_proj", "router", "experts"])
NAMES = st.lists(PARTS, min_size=1, max_size=5).map(".".join)
ENTRIES = NAMES | st.sampled_from(
    ["model.layers.*", "proj", ".*gate", "mlp|router", "layers.1", "model.", "(model|mlp)"]
)


@given(name=NAMES, entries=st.lists(ENTRIES, min_size=1, max_size=3))
@pytest.mark.parametrize("method", ["fp8", "bitsandbytes", "awq"])
def test_exclusions_as_transformers_matches_them(method: str, name: str, entries: list[str]) -> None:
    key = "llm_int8_skip_modules" if method == "bitsandbytes" else "modules_to_not_convert"
    common = {"load_in_8bit": True, "weight_block_size": [128, 128]}
    config = parse_quantization({"quant_method": method, key: entries} | common)
    assert (config.format_of(name) is not None) == should_convert_module(name, entries)


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ({"quant_method": "fp8", "weight_block_size": None}, "fp8 with weight_block_size null is not served"),
        (
            {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["("]},
            r"'\(' is no regular expression",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "nvfp4-pack-quantized",
                "config_groups": {
                    "a": {"targets": ["Linear"], "weights": WEIGHTS | {"num_bits": 4, "strategy": "tensor_group"}}
                },
            },
            "layout nvfp4-pack-quantized with float4 weights and tensor_group scales is not served",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "int-quantized",
                "config_groups": {"a": {"targets": ["Linear"], "weights": INT8 | {"symmetric": False}}},
            },
            "int8 weights and channel scales is not served",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "float-quantized",
                "config_groups": {"a": {"targets": ["re:*"], "weights": WEIGHTS}},
            },
            r"'\*' is no regular expression",
        ),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "4-bit type fp4 is not served; nf4 is"),
        ({}, "quantized by an unnamed method; served are awq"),
    ],
)
def test_refused(scheme: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_quantization(scheme)


def test_online() -> None:
    for name in ("int8", "int4", "fp8"):
        config = online_quantization(name)
        assert config.name == f"{name} (quantized while loading)"
        assert config.format_of("model.layers.0.mlp.up_proj") is not None
        assert (config.format_of("lm_head") is not None) == (name == "int8")
        assert config.format_of("model.embed_tokens") is None
    with pytest.raises(InvalidOption, match="--quantization w8a8 is not known; use fp8, int4, int8"):
        online_quantization("w8a8")
