"""Checkpoints in forms that are not read are refused with a command; where it can be run here, it is."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.replica.model_source import resolve
from engine.errors import CheckpointError
from engine.weights.checkpoint import Checkpoint
from engine.weights.other_forms import describe_other_form

LLAMA = "python src/transformers/models/llama/convert_llama_weights_to_hf.py"
LLAMA_3: dict[str, Any] = {"dim": 4096, "vocab_size": 128256, "rope_theta": 500000.0, "norm_eps": 1e-05}


def meta_directory(folder: Path, params: dict[str, Any], num_shards: int = 1) -> Path:
    folder.mkdir(parents=True)
    (folder / "params.json").write_text(json.dumps(params))
    for shard in range(num_shards):
        (folder / f"consolidated.{shard:02d}.pth").touch()
    return folder


@pytest.mark.parametrize(
    ("name", "params", "num_shards", "command"),
    [
        ("llama-1-7b", {"dim": 4096, "norm_eps": 1e-06}, 1, f"{LLAMA} IN OUT --num_shards 1 --llama_version 1"),
        ("llama-2-13b", {"norm_eps": 1e-05}, 2, f"{LLAMA} IN OUT --num_shards 2 --llama_version 2"),
        ("llama-2-7b-chat", {"norm_eps": 1e-05}, 1, f"{LLAMA} IN OUT --num_shards 1 --llama_version 2 --instruct"),
        ("Llama-3-70B", LLAMA_3, 8, f"{LLAMA} IN OUT --num_shards 8 --llama_version 3"),
        (
            "Llama-3.1-8B-Instruct",
            LLAMA_3 | {"use_scaled_rope": True},
            1,
            f"{LLAMA} IN OUT --num_shards 1 --llama_version 3.1 --instruct",
        ),
        (
            "Llama-3.2-1B",
            LLAMA_3 | {"use_scaled_rope": True, "dim": 2048},
            1,
            f"{LLAMA} IN OUT --num_shards 1 --llama_version 3.2",
        ),
        (
            "Llama-4-Scout-Instruct",
            {"moe_args": {}, "vision_args": {}},
            8,
            "python src/transformers/models/llama4/convert_llama4_weights_to_hf.py IN OUT --num_shards 8 "
            "--convert_checkpoints --instruct",
        ),
        (
            "Llama-3.2-11B-Vision",
            LLAMA_3 | {"vision_chunk_size": 448},
            1,
            "python src/transformers/models/mllama/convert_mllama_weights_to_hf.py IN OUT --num_shards 1",
        ),
    ],
)
def test_metas_originals_name_their_converter(
    tmp_path: Path, name: str, params: dict[str, Any], num_shards: int, command: str
) -> None:
    folder = meta_directory(tmp_path / name, params, num_shards)
    with pytest.raises(CheckpointError) as caught:
        resolve(str(folder), None)
    expected = command.replace("IN", f"--input_dir {folder}", 1).replace("OUT", f"--output_dir {folder}-hf", 1)
    assert str(caught.value).endswith(f"convert it in a clone of huggingface/transformers: {expected}")


def test_originals_below_a_hub_directory_are_found(tmp_path: Path) -> None:
    meta_directory(tmp_path / "original", LLAMA_3)
    assert f"--input_dir {tmp_path / 'original'} " in str(describe_other_form(tmp_path))


def test_a_broken_params_file_still_gives_a_command(tmp_path: Path) -> None:
    folder = meta_directory(tmp_path / "old", {})
    (folder / "params.json").write_text("[")
    assert "--llama_version 2" in str(describe_other_form(folder))


def test_a_name_with_blanks_is_quoted(tmp_path: Path) -> None:
    folder = meta_directory(tmp_path / "my llama", LLAMA_3)
    words = shlex.split(str(describe_other_form(folder)).partition("python ")[2])
    assert words[1:5] == ["--input_dir", str(folder), "--output_dir", f"{folder}-hf"]


def test_gguf_files_are_pointed_at(tmp_path: Path) -> None:
    (tmp_path / "model-Q4_K_M.gguf").touch()
    with pytest.raises(CheckpointError, match=r"name the file itself: .*model-Q4_K_M\.gguf"):
        resolve(str(tmp_path), None)


def test_nothing_is_said_of_what_is_not_known(tmp_path: Path) -> None:
    assert describe_other_form(tmp_path) is None
    assert describe_other_form(tmp_path / "nowhere") is None


@pytest.mark.full
def test_the_command_for_pickled_weights_converts_them(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "old model"
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    config.architectures = ["LlamaForCausalLM"]
    model = LlamaForCausalLM(config)
    config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="pickled weights only") as caught:
        Checkpoint(folder)
    command = str(caught.value).partition("convert it: python ")[2]
    subprocess.run(f"{shlex.quote(sys.executable)} {command}", shell=True, check=True, capture_output=True, timeout=100)
    converted = tmp_path / "old model-safetensors"
    assert (converted / "tokenizer.json").read_text() == "{}"
    Checkpoint(converted).entry("model.embed_tokens.weight", (32, 16))
