"""What is not served is refused by name before any weight is read, and leaves nothing behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import Dtype
from engine.errors import AdapterError
from engine.layers.lora import LoraLayer
from engine.model_config import ModelConfig
from engine.models.registry import build_model
from engine.parallel.mesh import Mesh
from engine.weights.adapter_loader import AdapterLoader
from tests.lora.mixed import Adapted

WEIGHTS = "adapter_model.safetensors"
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def model(adapted: Callable[[str], Adapted]) -> torch.nn.Module:
    config = ModelConfig.from_directory(adapted("llama").base)
    found = build_model(config, Mesh(), Dtype.FLOAT32, torch.device("cpu"))
    assert isinstance(found, torch.nn.Module)
    return found


@pytest.fixture
def copy(adapted: Callable[[str], Adapted], tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapted("llama").adapters[0], tmp_path / "adapter"))


def refuse(model: Any, directory: Path, words: str, max_rank: int = 64) -> None:
    with pytest.raises(AdapterError, match=words):
        AdapterLoader(model, Mesh()).load(3, directory, max_rank)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert layers and not any(layer.slots for layer in layers), "a refused adapter left weights behind"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, "use_dora is set: DoRA"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa"}, "'pissa', which changes the base model"),
        ({"some_new_method": {"depth": 3}}, "some_new_method is set"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"r": "eight"}, "not as PEFT writes it"),
        ({"r": 0}, "at least 1"),
        ({"r": float("inf")}, "not as PEFT writes it"),
        ({"lora_alpha": float("nan")}, "finite"),
        ({"rank_pattern": {"(": 4}}, "not as PEFT writes it"),
        ({"rank_pattern": {"k_proj": 80}}, "rank 80 is above the 64 that --max-lora-rank"),
        ({"r": 5}, r"has shape \[4, 96\].*make it \[5, 96\]"),
    ],
)
def test_settings(model: Any, copy: Path, changes: dict[str, Any], words: str) -> None:
    path = copy / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refuse(model, copy, words)


def _rename(module: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace("model.layers.0.self_attn.q_proj", module): t for name, t in tensors.items()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_rename("model.embed_tokens"), "adapts model.embed_tokens, which cannot be adapted"),
        (_rename("lm_head"), "adapts lm_head"),
        (_rename("model.layers.7.self_attn.q_proj"), "layers.7"),
        (lambda t: {k: v for k, v in t.items() if k != f"{Q_PROJ}.lora_B.weight"}, "q_proj has lora_A alone"),
        (lambda t: t | {f"{Q_PROJ}.lora_magnitude_vector": torch.ones(4)}, "lora_magnitude_vector"),
        (lambda t: t | {f"{Q_PROJ}.lora_B.weight": torch.ones(4, 4)}, r"q_proj.lora_B.weight' has shape \[4, 4\]"),
        (lambda t: t | {f"{Q_PROJ}.lora_A.weight": torch.ones(4, 64).int()}, "format I32"),
        (lambda t: t | {f"{Q_PROJ}.lora_A.weight": torch.full((4, 64), torch.nan)}, "q_proj.lora_A.weight.*NaN"),
        (lambda t: t | {f"{Q_PROJ}.lora_B.weight": torch.full((128, 4), torch.inf)}, "q_proj.lora_B.weight.*infinite"),
        (lambda t: {}, "no LoRA weights"),
    ],
)
def test_tensors(model: Any, copy: Path, change: Callable[[Tensors], Tensors], words: str) -> None:
    save_file(change(load_file(copy / WEIGHTS)), copy / WEIGHTS)
    refuse(model, copy, words)


def test_files(model: Any, copy: Path, tmp_path: Path) -> None:
    refuse(model, copy, "rank 4 is above the 2", max_rank=2)
    (copy / WEIGHTS).rename(copy / "adapter_model.bin")
    refuse(model, copy, "has only adapter_model.bin; save the adapter as safetensors")
    (copy / "adapter_model.bin").rename(copy / WEIGHTS)
    content = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(content[:-100])
    refuse(model, copy, WEIGHTS)
    for content_of_config in ("{", "[" * 100_000):
        (copy / "adapter_config.json").write_text(content_of_config)
        refuse(model, copy, "adapter_config.json cannot be read")
    refuse(model, tmp_path / "none", "adapter_config.json does not exist")


def test_an_adapter_of_another_model(adapted: Callable[[str], Adapted], model: Any) -> None:
    refuse(model, adapted("mixtral").adapters[0], "cannot be adapted here|has shape")


def test_experts_of_another_rank(adapted: Callable[[str], Adapted], tmp_path: Path) -> None:
    made = adapted("llama4")
    copy = Path(shutil.copytree(made.adapters[1], tmp_path / "adapter"))
    path = copy / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 4}))
    config = ModelConfig.from_directory(made.base)
    refuse(build_model(config, Mesh(), Dtype.FLOAT32, torch.device("cpu")), copy, "not of rank 4 for 4 experts")
