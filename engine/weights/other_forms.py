"""Checkpoints in forms that are not read, and what to run to get one that is. Torch-free.

transformers keeps its converters of Meta's files in its source tree, not in its wheels.
"""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_CONVERTERS = "src/transformers/models"


def describe_other_form(directory: Path) -> str | None:
    """One paragraph that names the form of ``directory`` and the command that converts it; None for an unknown one.

    Meant for a directory without safetensors, or without a config.json.
    """
    if not directory.is_dir():
        return None
    for folder in (directory, directory / "original"):
        if num_shards := len(list(folder.glob("consolidated*.pth"))):
            return _describe_meta(directory, folder, num_shards)
    if (directory / "config.json").is_file() and (pickles := sorted(directory.glob("pytorch_model*.bin"))):
        return _describe_pickles(directory, pickles[0].name)
    if gguf_files := sorted(directory.glob("*.gguf")):
        return f"{directory} holds GGUF files; name the file itself: {_quoted(gguf_files[0])}"
    return None


def _describe_meta(directory: Path, folder: Path, num_shards: int) -> str:
    params = _read_params(folder / "params.json")
    options = f"--input_dir {_quoted(folder)} --output_dir {_quoted(_beside(directory, 'hf'))}"
    options += f" --num_shards {num_shards}"
    is_instruct = any(word in str(directory.absolute()).lower() for word in ("instruct", "chat"))
    instruct = " --instruct" if is_instruct else ""
    if "moe_args" in params or "vision_args" in params:
        converter, options = "llama4/convert_llama4_weights_to_hf.py", f"{options} --convert_checkpoints{instruct}"
    elif "vision_chunk_size" in params:
        converter = "mllama/convert_mllama_weights_to_hf.py"
    else:
        version = _version(params)
        converter, options = "llama/convert_llama_weights_to_hf.py", f"{options} --llama_version {version}{instruct}"
    return (
        f"{folder} holds Meta's original checkpoint (pickles), which is not read; convert it in a clone of "
        f"huggingface/transformers: python {_CONVERTERS}/{converter} {options}"
    )


def _version(params: Mapping[str, Any]) -> str:
    """Of the converter's --llama_version, from params.json. Nothing in it tells Llama 1 of 65B from Llama 2."""
    if params.get("rope_theta") == 500_000:
        if not params.get("use_scaled_rope"):
            return "3"
        return "3.2" if params.get("dim") in (2048, 3072) else "3.1"
    return "1" if params.get("norm_eps") == 1e-6 else "2"


def _describe_pickles(directory: Path, example: str) -> str:
    target = _beside(directory, "safetensors")
    code = (
        "from transformers import AutoModelForCausalLM as M; "
        f"M.from_pretrained({str(directory)!r}, dtype='auto').save_pretrained({str(target)!r})"
    )
    return (
        f"{directory} holds pickled weights only ({example}), which are not read: a pickle can run any code. If you "
        f"trust it, convert it: python -c {shlex.quote(code)} && cp -n {_quoted(directory)}/*token* {_quoted(target)}"
    )


def _beside(directory: Path, suffix: str) -> Path:
    absolute = directory.absolute()
    return absolute.with_name(f"{absolute.name}-{suffix}")


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _read_params(path: Path) -> Mapping[str, Any]:
    """Empty where there is none to be read: the command is the same, its version a guess."""
    try:
        params = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return params if isinstance(params, dict) else {}
