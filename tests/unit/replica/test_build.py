"""What a rank runs, compared with its leader's."""

import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from cluster.errors import StartFailed
from cluster.replica.build import CHECKPOINT, CODE, check_same, software, with_checkpoint
from engine.errors import CheckpointError


def test_it_names_what_is_installed_and_tells_checkpoints_of_one_shape_apart(tmp_path: Path) -> None:
    own = software()
    assert own["torch"] == version("torch") and len(own[CODE]) == 16
    weights = np.random.default_rng(0).standard_normal(1_000_000)
    directories = [tmp_path / name for name in ("one", "same", "tuned")]
    for directory, values in zip(directories, (weights, weights, weights + 1e-9), strict=True):
        directory.mkdir()
        (directory / "model.safetensors").write_bytes(values.tobytes())
    one, same, tuned = (with_checkpoint(own, directory) for directory in directories)
    assert one == same and one != tuned and {**tuned, CHECKPOINT: one[CHECKPOINT]} == one
    shutil.rmtree(directories[0])
    with pytest.raises(CheckpointError):
        with_checkpoint(own, directories[0])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"torch": "1.0"}, "torch 1.0, where the leader on a has torch 2.0; install the same wheels there"),
        ({CODE: "ff"}, "remuda's files ff, where the leader on a has remuda's files 00; install the same wheels there"),
        ({CHECKPOINT: "x"}, "checkpoint x, where the leader on a has checkpoint y; copy the same checkpoint there"),
        (
            {"torch": "1.0", CHECKPOINT: "x"},
            "torch 1.0, checkpoint x, where the leader on a has torch 2.0, checkpoint y; "
            "install the same wheels there and copy the same checkpoint there",
        ),
    ],
)
def test_a_rank_that_runs_something_else_may_not_join(changes: dict[str, str], told: str) -> None:
    own = {"torch": "2.0", CODE: "00", CHECKPOINT: "y"}
    check_same("rank 1 on b", own, "a", own)
    with pytest.raises(StartFailed) as refused:
        check_same("rank 1 on b", own | changes, "a", own)
    assert str(refused.value) == f"rank 1 on b may not join: {told}"


def test_a_rank_that_tells_nothing_may_not_join() -> None:
    with pytest.raises(StartFailed, match="rank 0 on b may not join: torch not told, where the leader on a has torch"):
        check_same("rank 0 on b", {}, "a", {"torch": "2"})
