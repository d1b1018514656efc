"""A rank's peak memory while it loads stays close to its shard; and the measurement would show it if not."""

import json
from pathlib import Path

import pytest
import torch

from engine.config import Dtype, ParallelConfig
from engine.model_config import ModelConfig
from engine.models.registry import build_model
from engine.parallel.mesh import Mesh
from engine.weights.measure_peak import main, measure

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 16000,
    "hidden_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 8192,
    "max_position_embeddings": 1024,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """540 MB of zeros that take no room on disk."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    model = build_model(ModelConfig.from_hf(CONFIG), Mesh(), Dtype.BFLOAT16, torch.device("meta"))
    header, offset = {}, 0
    for name, shape in sorted({(piece.name, piece.shape) for piece in model.slices}):
        num_bytes = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + num_bytes]}
        offset += num_bytes
    encoded = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + offset)
    return tmp_path


@pytest.mark.timeout(180)
def test_peak_memory(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(checkpoint), "--tp", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    results = [json.loads(line) for line in lines[:-1]]
    assert [result["rank"] for result in results] == [0, 1]
    for result in results:
        assert result["shard_bytes"] > 250e6
        # Below 1 the weights would not be resident, and the measurement worth nothing.
        assert 0.99 <= result["ratio"] <= 1.10


@pytest.mark.timeout(180)
def test_a_rank_that_fails_is_reported(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(SystemExit, match=r"ranks \[0\] failed"):
        measure(str(checkpoint), ParallelConfig(), Dtype.BFLOAT16)
