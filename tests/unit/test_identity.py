"""Which changes of a checkpoint make it another one."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from engine.errors import CheckpointError
from engine.weights.identity import checkpoint_identity


def write(directory: Path, weights: np.ndarray, config: str = "{}") -> Path:
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(weights.tobytes())
    (directory / "config.json").write_text(config)
    return directory


def test_what_makes_another_checkpoint(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    weights = random.standard_normal(1_000_000).astype(np.float32)
    first = write(tmp_path / "first", weights)
    identity = checkpoint_identity(first)
    moved = shutil.copytree(first, tmp_path / "elsewhere")
    (moved / "README.md").write_text("not read to serve")
    assert checkpoint_identity(moved) == identity
    tuned = weights + random.standard_normal(weights.shape).astype(np.float32) * 1e-3
    assert checkpoint_identity(write(tmp_path / "tuned", tuned)) != identity
    assert checkpoint_identity(write(tmp_path / "configured", weights, '{"rope_theta": 1}')) != identity
    assert checkpoint_identity(write(tmp_path / "longer", np.append(weights, np.float32(0)))) != identity


def test_every_byte_of_a_small_file_counts(tmp_path: Path) -> None:
    values = np.zeros(200_000, dtype=np.uint8)
    identities = {checkpoint_identity(write(tmp_path / "zeros", values))}
    for place in (0, 1, 4095, 4096, 70_001, 199_999):
        changed = values.copy()
        changed[place] = 1
        identities.add(checkpoint_identity(write(tmp_path / str(place), changed)))
    assert len(identities) == 7


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a directory nor a file"):
        checkpoint_identity(tmp_path / "missing")
