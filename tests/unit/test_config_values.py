"""config.json with values of a wrong kind: one clear line each, whatever is wrong."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from engine.config import ParallelConfig
from engine.errors import CheckpointError, InvalidInput
from engine.model_config import ModelConfig, kv_groups, validate_layout
from engine.models.shapes.registry import shapes_of

MODELS = Path(__file__).parents[1] / "data" / "models"
FILES = ("Llama-3.1-405B-FP8", "Llama-4-Maverick-17B-128E-Instruct-FP8", "Mixtral-8x22B", "Qwen3-235B-A22B")
PLANNED = ("DeepSeek-V3", "Gemma-3-27B", "Llama-3.2-11B-Vision-Instruct", "Phi-4")
BAD: tuple[Any, ...] = (None, -1, 0, 1e30, 10**30, "abc", [], {}, [1], {"a": 1}, 1.5, math.nan, math.inf)


def hub_config(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((MODELS / f"{name}.json").read_text())
    return content


def broken(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """``config`` with each of its values, also those within objects, missing or bad."""
    for key, value in config.items():
        yield {name: other for name, other in config.items() if name != key}
        for bad in BAD:
            yield {**config, key: bad}
        if isinstance(value, dict):
            for inner in broken(value):
                yield {**config, key: inner}


@pytest.mark.parametrize("name", [*FILES, *PLANNED])
def test_nothing_but_a_refusal_of_ours(name: str) -> None:
    """Many of these are as good as before; whatever is not is refused in one line."""
    num_refused = 0
    for config in broken(hub_config(name)):
        try:
            shapes_of(config)
            if name in FILES:
                model = ModelConfig.from_hf(config)
                validate_layout(model, ParallelConfig(tp=2))
                assert kv_groups(model)
        except InvalidInput as error:
            num_refused += 1
            assert "\n" not in str(error)
    assert num_refused > 100


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_hidden_layers": "abc"}, "config.json: num_hidden_layers is 'abc'; it must be a whole number from 1 to"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; it must be a whole number from 1 to 10000"),
        ({"hidden_size": None}, "hidden_size is null; it must be a whole number above 0"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; it must be true or false"),
        ({"rope_scaling": [1]}, r"rope_scaling is \[1\]; it must be an object"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'; it must be a token id or a list of token ids"),
        ({"head_dim": 7}, "heads of 7 channels; the rotary embedding needs an even number"),
        ({"num_experts_per_tok": 9}, "a token sees 9 of 8 experts"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan; it must be a number above 0"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 128]}}, "blocks of 0 × 128"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": 5}}, "not as transformers writes it"),
    ],
)
def test_the_message_names_the_value(values: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_hf(hub_config("Mixtral-8x22B") | values)


def test_generation_config_is_named() -> None:
    with pytest.raises(CheckpointError, match="generation_config.json: eos_token_id is"):
        ModelConfig.from_hf(hub_config("Mixtral-8x22B"), {"eos_token_id": {"id": 2}})
