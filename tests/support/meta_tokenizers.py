"""Llama 3's and Llama 4's own tokenizers as Hugging Face model directories, out of the wheel that `make setup` fetches.

The wheel (llama-models on PyPI) holds Meta's tokenizer.model files: lines of a token's bytes in base64 and its rank.
transformers converts them once, and the result stays beside the wheel; none of it belongs into the repository.
"""

import base64
import hashlib
import json
import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import transformers
from transformers.convert_slow_tokenizer import TikTokenConverter

_SHA256 = {
    "llama3": "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55",
    "llama4": "d0bdbaf59b0762c8c807617e2d8ea51420eb1b1de266df2495be755c8e0ed6ed",
}
_LETTER = r"\p{Lm}\p{Lo}\p{M}"
_PATTERNS = {
    "llama3": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "llama4": (
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{_LETTER}]*[\p{{Ll}}{_LETTER}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        rf"|[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{_LETTER}]+[\p{{Ll}}{_LETTER}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}


class _Converter(TikTokenConverter):  # type: ignore[misc]
    """Reads the ranks without the package tiktoken."""

    @staticmethod
    def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
        lines = Path(tiktoken_url).read_text().splitlines()
        return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}


def special_tokens(family: str) -> list[str]:
    """In the order of their ids, which follow the ranks."""
    if family == "llama3":
        named = (
            "begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1 finetune_right_pad_id step_id"
        )
        named += " start_header_id end_header_id eom_id eot_id python_tag image"
        names = named.split() + [f"reserved_special_token_{index}" for index in range(2, 246)]
    else:
        names = (
            "begin_of_text end_of_text fim_prefix fim_middle fim_suffix header_start header_end eom eot step".split()
        )
        names += [f"text_post_train_reserved_special_token_{index}" for index in range(6)]
        names += "python_start python_end finetune_right_pad".split()
        names += [f"text_post_train_reserved_special_token_{index}" for index in range(8, 69)]
        names += "image_start image_end".split() + [f"vision_reserved_special_token_{index}" for index in range(2)]
        names += "tile_x_separator tile_y_separator".split()
        names += [f"vision_reserved_special_token_{index}" for index in range(2, 6)]
        names += "image vision_reserved_special_token_6 patch".split()
        names += [f"vision_reserved_special_token_{index}" for index in range(7, 1048)]
        names += [f"reasoning_reserved_special_token_{index}" for index in range(8)]
        names += "reasoning_thinking_start reasoning_thinking_end".split()
        names += [f"reserved_special_token_{index}" for index in range(2048 - len(names))]
    return [f"<|{name}|>" for name in names]


def _converted(family: str) -> Path:
    """The tokenizer.json, made in 4 to 6 seconds where it is not there. Fails where the wheel is missing."""
    folder = Path(sys.prefix) / "wheels"
    wheels = list(folder.glob("llama_models-0.3.0-*.whl"))
    if not wheels:
        pytest.fail("the wheel llama-models 0.3.0 is missing; run `make setup`, which fetches it")
    kept = folder / f"{family}.transformers-{transformers.__version__}.json"
    if kept.is_file():
        return kept
    with zipfile.ZipFile(wheels[0]) as wheel:
        model = wheel.read(f"models/{family}/tokenizer.model")
    assert hashlib.sha256(model).hexdigest() == _SHA256[family]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        source, target = Path(scratch, "tokenizer.model"), Path(scratch, "tokenizer.json")
        source.write_bytes(model)
        converter = _Converter(str(source), _PATTERNS[family], extra_special_tokens=special_tokens(family))
        converter.converted().save(str(target))
        os.replace(target, kept)
    return kept


def model_directory(path: Path, family: str, template: str, num_tokens: int) -> Path:
    """A directory with tokenizer.json and the small JSON files."""
    path.mkdir()
    shutil.copyfile(_converted(family), path / "tokenizer.json")
    end = "<|eot_id|>" if family == "llama3" else "<|eot|>"
    named = {"bos_token": "<|begin_of_text|>", "eos_token": end}
    files = {
        "config.json": {"model_type": "llama", "vocab_size": num_tokens},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template, **named},
    }
    for name, content in files.items():
        (path / name).write_text(json.dumps(content))
    return path
