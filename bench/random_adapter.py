"""A LoRA adapter of remuda-tiny in PEFT's form, with random weights that change what it says."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

_RANK = 4
_NUM_EXPERTS, _HIDDEN_SIZE, _GATE_UP = 4, 256, 512
_SPREAD = 0.08
"""Standard deviation of both factors: tokens change, and stay far from ties."""


def write_random_adapter(directory: Path) -> None:
    """Of attention, feed-forward and routed experts. The same in every call."""
    random = torch.Generator().manual_seed(3)
    tensors: dict[str, torch.Tensor] = {}

    def adapt(module: str, down: tuple[int, int], up: tuple[int, int]) -> None:
        for letter, shape in (("A", down), ("B", up)):
            name = f"base_model.model.model.layers.{module}.lora_{letter}.weight"
            tensors[name] = torch.randn(shape, generator=random) * _SPREAD

    for layer in range(8):
        adapt(f"{layer}.self_attn.q_proj", (_RANK, _HIDDEN_SIZE), (256, _RANK))
        adapt(f"{layer}.self_attn.v_proj", (_RANK, _HIDDEN_SIZE), (128, _RANK))
    for layer in (0, 2):
        adapt(f"{layer}.feed_forward.down_proj", (_RANK, 512), (_HIDDEN_SIZE, _RANK))
    for layer in (1, 5):
        # Of all experts together, stored the other way round, as PEFT does for Llama 4.
        rows = _RANK * _NUM_EXPERTS
        adapt(f"{layer}.feed_forward.experts", (rows, _GATE_UP), (_HIDDEN_SIZE, rows))
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": _RANK,
        "lora_alpha": 2 * _RANK,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "target_parameters": ["feed_forward.experts.gate_up_proj"],
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
