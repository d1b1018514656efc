"""Frequencies and rotations against transformers' own functions, on the settings of released models and beyond."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.batch import ForwardBatch
from engine.layers.rotary import RotaryEmbedding, inverse_frequencies
from engine.rope_config import parse_rope

transformers = pytest.importorskip("transformers")
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb  # noqa: E402

DATA = Path(__file__).parents[1] / "data" / "models"
HUB_NAMES = ["CodeLlama-34B", "Llama-3.1-405B", "Llama-3.2-1B", "Llama-4-Scout-17B-16E-Instruct"]
VARIANTS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    | {"original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "attention_factor": 1.25},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "mscale": 0.7, "mscale_all_dim": 0.4},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "truncate": False, "beta_fast": 8.0},
    {"rope_type": "yarn", "original_max_position_embeddings": 64},
]


def batch_of(positions: torch.Tensor, prompt_len: int) -> ForwardBatch:
    empty = torch.empty(0, dtype=torch.int64)
    count = len(positions)
    return ForwardBatch(positions, positions, (count,), (int(positions[-1]) + 1,), (), (), empty, (prompt_len,))


def oracle_config(variant: dict[str, Any]) -> Any:
    return transformers.LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        max_position_embeddings=256,
        rope_parameters={"rope_theta": 10000.0, **variant},
    )


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(map(str, variant.values())))
def test_frequencies(variant: dict[str, Any]) -> None:
    if "factor" not in variant and variant["rope_type"] != "default":
        variant = variant | {"factor": None}
    config = oracle_config(variant)
    ours, factor = inverse_frequencies(parse_rope(config.to_dict(), 32, 10000.0, interleaved=False))
    if variant["rope_type"] == "default":
        expected, expected_factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        expected, expected_factor = ROPE_INIT_FUNCTIONS[variant["rope_type"]](config, "cpu")
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    assert factor == pytest.approx(expected_factor)


@pytest.mark.parametrize("name", HUB_NAMES)
def test_released_models(name: str) -> None:
    hub = json.loads((DATA / f"{name}.json").read_text())
    text = hub.get("text_config", hub)
    is_llama4 = "text_config" in hub
    config = (transformers.Llama4TextConfig if is_llama4 else transformers.LlamaConfig)(**text)
    ours, _ = inverse_frequencies(parse_rope(text, config.head_dim, 10000.0, interleaved=is_llama4))
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        expected, _ = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        expected, _ = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)


def test_old_spelling_of_the_type() -> None:
    values = {"max_position_embeddings": 64, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert parse_rope(values, 32, 10000.0, interleaved=False).factor == 2.0


@pytest.mark.parametrize("length", [100, 256, 300, 900])
def test_dynamic_frequencies_of_a_whole_prompt(length: int) -> None:
    config = oracle_config({"rope_type": "dynamic", "factor": 2.0})
    heads = torch.randn(length, 2, 32)
    cos, sin = LlamaRotaryEmbedding(config)(heads, torch.arange(length)[None])
    expected, _ = apply_rotary_pos_emb(heads.transpose(0, 1)[None], heads.transpose(0, 1)[None], cos, sin)
    rotary = RotaryEmbedding(parse_rope(config.to_dict(), 32, 10000.0, interleaved=False), torch.device("cpu"))
    for start, stop in ((0, length), (length // 3, length)):
        rotated = rotary.rotation(batch_of(torch.arange(start, stop), length)).apply(heads[start:stop])
        torch.testing.assert_close(rotated, expected[0].transpose(0, 1)[start:stop], rtol=1e-4, atol=1e-4)


def test_dynamic_frequencies_of_a_generated_token_do_not_depend_on_replay() -> None:
    """Prefilled again after a preemption, a generated token gets the same rotation as when it was decoded."""
    config = parse_rope(oracle_config({"rope_type": "dynamic", "factor": 2.0}).to_dict(), 32, 10000.0, False)
    rotary = RotaryEmbedding(config, torch.device("cpu"))
    replayed = rotary.rotation(batch_of(torch.arange(400), 300))
    decoded = rotary.rotation(batch_of(torch.tensor([350]), 300))
    torch.testing.assert_close(replayed.cos[350], decoded.cos[0], rtol=0, atol=0)


def test_bfloat16_rotation_keeps_its_format() -> None:
    for interleaved in (False, True):
        config = parse_rope(oracle_config({"rope_type": "default"}).to_dict(), 32, 10000.0, interleaved)
        rotation = RotaryEmbedding(config, torch.device("cpu")).rotation(batch_of(torch.arange(5), 5))
        heads = torch.randn(5, 2, 32)
        rotated = rotation.apply(heads.bfloat16())
        assert rotated.dtype is torch.bfloat16
        torch.testing.assert_close(rotated.float(), rotation.apply(heads), rtol=0.05, atol=0.05)
