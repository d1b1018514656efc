"""Starting and stopping: what is refused before anything runs, and what is left behind (nothing)."""

import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cluster.replica.model_source import resolve
from tests.support.served import Served, free_port, run_remuda
from tests.support.shared_memory import left_since, shared_memory_files

TINY = str(resolve("remuda-tiny", None).directory())


@pytest.fixture
def own_tmp() -> Iterator[Path]:
    """A TMPDIR of this test's own, with a short name, so that what is left in it can only be ours."""
    with tempfile.TemporaryDirectory(prefix="rt", dir="/tmp") as name:
        yield Path(name)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("remuda-tiny", "--tp", "3"), ["tp=3", "8 attention heads"]),
        (("remuda-tiny", "--tp", "2", "--ep", "3"), ["ep=3", "1 × 2"]),
        (("remuda-tiny", "--tp", "8", "--ep", "8"), ["ep=8", "4 experts"]),
        (("remuda-tiny", "--tp", "4", "--cpu-slots", "2"), ["4", "2 CPU slots", "--cpu-slots"]),
        (("remuda-tiny", "--pp", "9", "--cpu-slots", "9"), ["pp=9", "8 layers"]),
        (("remuda-tiny", "--host", "0.0.0.0"), ["--api-key-file"]),
        (("remuda-tiny", "--deterministic", "--quantization", "int8"), ["--deterministic", "int8"]),
        (("remuda-tiny", "--address", "somewhere"), ["--address", "somewhere", "HOST:PORT"]),
        (("remuda-tiny", "--max-model-len", "999999"), ["--max-model-len", "999999"]),
        (("remuda-tiny", "--max-num-seqs", "64", "--max-num-batched-tokens", "8"), ["max-num-batched-tokens"]),
        (("/nowhere/at/all",), ["/nowhere/at/all", "not a directory"]),
        (("remuda-tiny", "--dtype", "int3"), ["--dtype", "int3"]),
    ],
)
def test_bad_input_ends_with_status_2_and_one_line(arguments: tuple[str, ...], words: list[str], own_tmp: Path) -> None:
    started_s = time.monotonic()
    ports = ("--port", str(free_port()), "--grpc-port", str(free_port()))
    result = run_remuda("serve", *arguments, *ports, TMPDIR=str(own_tmp))
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr
    assert result.stdout == ""
    assert time.monotonic() - started_s < 30
    assert list(own_tmp.iterdir()) == []


@pytest.fixture
def broken_checkpoint(tmp_path: Path) -> Path:
    """remuda-tiny without one of its tensors."""
    for file in Path(TINY).iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(Path(TINY) / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_a_missing_tensor_is_named_and_nothing_is_left(broken_checkpoint: Path, tmp_path: Path, own_tmp: Path) -> None:
    shared_before = shared_memory_files()
    server = Served((str(broken_checkpoint), "--tp", "2"), tmp_path / "serve.log", own_tmp)
    server.start()
    assert server.process is not None
    assert server.process.wait(90) == 2, server.log.read_text()
    assert "model.layers.1.self_attn.q_proj.weight" in server.log.read_text()
    assert server.left_processes() == []
    assert list(own_tmp.iterdir()) == []
    assert not left_since(shared_before)


@pytest.mark.timeout(240)
def test_stopping_leaves_nothing_behind(tmp_path: Path, own_tmp: Path) -> None:
    """SIGTERM while it starts, SIGINT when it is ready, SIGKILL of the command itself: each time all is gone."""
    shared_before = shared_memory_files()
    starting = Served(("remuda-tiny", "--tp", "2"), tmp_path / "starting.log", own_tmp)
    starting.start()
    while "starting Ray" not in starting.log.read_text():
        time.sleep(0.05)
    assert starting.stop() == 1, starting.log.read_text()
    assert starting.left_processes() == []

    with Served(("remuda-tiny", "--tp", "2"), tmp_path / "ready.log", own_tmp) as ready:
        assert ready.stop(signal.SIGINT) == 0, ready.log.read_text()
    assert ready.left_processes() == []

    with Served(("remuda-tiny",), tmp_path / "killed.log", own_tmp) as killed:
        assert killed.stop(signal.SIGKILL) == -signal.SIGKILL
    assert killed.left_processes(30) == []
    assert list(own_tmp.iterdir()) == []
    assert not left_since(shared_before)


def test_a_port_in_use_is_refused(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = run_remuda("serve", "--port", port, "--grpc-port", str(free_port()))
    assert result.returncode == 2
    assert f"--port {port}" in result.stderr


def test_both_apis_on_one_port_are_refused() -> None:
    port = str(free_port())
    result = run_remuda("serve", "--port", port, "--grpc-port", port)
    assert result.returncode == 2
    assert "--grpc-port" in result.stderr
