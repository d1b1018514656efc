"""Turns remuda-tiny into an NF4 checkpoint by bitsandbytes, in the layout that transformers writes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from bitsandbytes import functional
from safetensors.torch import load_file, save_file
from torch import Tensor

_MATRIX = re.compile(r".*\.[a-z]+_proj\.weight")
_FUSED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")


def write_nf4(directory: Path, out: Path) -> None:
    """Every matrix of attention and feed-forward layers, each expert's by itself; embedding and routers stay as they
    are. Constants are quantized too ("double quantization")."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        matrices = dict(_matrices(name, tensor))
        if not matrices:
            tensors[name] = tensor
        for module, matrix in matrices.items():
            packed, state = functional.quantize_4bit(matrix, quant_type="nf4", compress_statistics=True)
            tensors[f"{module}.weight"] = packed
            tensors |= {f"{module}.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "llm_int8_skip_modules": ["lm_head", "router"],
    }
    (out / "config.json").write_text(json.dumps(config))
    shutil.copy(directory / "tokenizer.json", out)


def _matrices(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The matrices [out, in] within a tensor, by name without ``.weight``."""
    if _MATRIX.fullmatch(name):
        yield name.removesuffix(".weight"), tensor
    elif fused := _FUSED.fullmatch(name):
        kinds = ("gate_proj", "up_proj") if fused[2] == "gate_up_proj" else ("down_proj",)
        for expert, by_input in enumerate(tensor):
            for kind, rows in zip(kinds, by_input.t().chunk(len(kinds)), strict=True):
                yield f"{fused[1]}.{expert}.{kind}", rows.contiguous()
