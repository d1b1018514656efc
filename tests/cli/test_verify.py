"""``remuda verify`` as a user runs it: writes, checks, names what is damaged, and its exit status."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.cli.main import app
from engine.errors import CheckpointError
from engine.weights.manifest import MANIFEST_FILE

TINY = Path(__file__).parents[2] / "engine" / "assets" / "remuda-tiny"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def run(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["verify", *map(str, arguments)])
    if isinstance(result.exception, CheckpointError):
        raise result.exception
    return result.exit_code, result.stdout


def run_json(*arguments: str | Path) -> tuple[int, dict[str, Any]]:
    status, output = run(*arguments, "--json")
    return status, json.loads(output)


def test_the_first_run_writes_and_the_second_checks(checkpoint: Path) -> None:
    status, output = run(checkpoint)
    assert (status, output.split(":")[0]) == (0, f"wrote {checkpoint / MANIFEST_FILE}")
    before = (checkpoint / MANIFEST_FILE).stat().st_mtime_ns
    status, output = run(checkpoint)
    assert (status, output.split(":")[0]) == (0, f"all is as {checkpoint / MANIFEST_FILE} says")
    assert (checkpoint / MANIFEST_FILE).stat().st_mtime_ns == before


def test_damage_is_named_with_status_1(checkpoint: Path) -> None:
    run(checkpoint)
    with (checkpoint / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    (checkpoint / "generation_config.json").unlink()
    status, output = run(checkpoint)
    assert status == 1
    assert "generation_config.json is missing\n" in output
    assert "model.safetensors differs in bytes 0 to 15231064: (header), " in output
    assert output.splitlines()[-1].startswith("2 differences; download again")


def test_json(checkpoint: Path) -> None:
    status, answer = run_json(checkpoint)
    assert status == 0
    assert {key: answer[key] for key in ("action", "ok", "num_files", "damage")} == {
        "action": "written",
        "ok": True,
        "num_files": 5,
        "damage": [],
    }
    (checkpoint / "config.json").write_text("{}")
    status, answer = run_json(checkpoint)
    assert status == 1
    assert (answer["action"], answer["ok"]) == ("checked", False)
    assert [(item["file"], item["kind"]) for item in answer["damage"]] == [("config.json", "size")]


def test_a_manifest_elsewhere(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    assert run(checkpoint, "--manifest", path)[0] == 0
    assert path.is_file()
    assert not (checkpoint / MANIFEST_FILE).exists()
    assert run(checkpoint, "--manifest", path)[0] == 0


def test_bad_input(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="is neither a directory nor a file"):
        run(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no safetensors or GGUF files"):
        run(tmp_path)
    with pytest.raises(CheckpointError, match=r"cannot be written .* --manifest FILE"):
        run(checkpoint, "--manifest", tmp_path / "no" / "such" / "place.json")


def test_exit_status_2_from_the_command_itself(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cluster.cli.main", "verify", str(tmp_path / "nowhere")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("remuda: ")
    assert len(result.stderr.splitlines()) == 1
