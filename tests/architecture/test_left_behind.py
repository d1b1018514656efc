"""The check in tests/conftest.py that no process outlives the tests, tried on a test that leaves one."""

import subprocess
import sys
from pathlib import Path

import psutil

from tests.architecture.source_tree import ROOT

LEAVES_ONE = """
import pathlib, subprocess
def test_leaves_one():
    # In a session of its own and with another parent, as a daemon is.
    shell = "setsid sleep 300 >/dev/null 2>&1 & echo $!"
    pid = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=True).stdout
    pathlib.Path(__file__).with_name("pid").write_text(pid)
"""
LEAVES_NONE = """
import subprocess
def test_leaves_none():
    subprocess.run(["true"], check=True)
"""


def _run_tests(folder: Path, source: str) -> subprocess.CompletedProcess[str]:
    path = folder / "test_planted.py"
    path.write_text(source)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "tests.conftest",
        "-c",
        str(ROOT / "pyproject.toml"),
        str(path),
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def _is_running(pid: int) -> bool:
    """An ended process whose parent has not asked for its status is still listed."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_process_left_behind_fails_the_run_and_is_ended(tmp_path: Path) -> None:
    result = _run_tests(tmp_path, LEAVES_ONE)
    assert result.returncode == 1, result.stdout
    assert "processes were left behind" in result.stdout
    assert "sleep 300" in result.stdout
    assert not _is_running(int((tmp_path / "pid").read_text()))


def test_a_run_that_leaves_nothing_passes(tmp_path: Path) -> None:
    result = _run_tests(tmp_path, LEAVES_NONE)
    assert result.returncode == 0, result.stdout
