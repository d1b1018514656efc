"""Ray as we start it: on loopback only, with a token, without a trace afterwards; and a Ray of others survives us."""

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.control.ray_node import RayNode
from cluster.control.ray_settings import LOOPBACK, NodeSpec, authentication_environment
from cluster.errors import StartFailed
from engine.errors import InvalidOption
from tests.support.shared_memory import left_since, shared_memory_files

ROOT = Path(__file__).parents[2]
START_ACTOR = """
import json, os, ray
from cluster.control.ray_runtime import RayRuntime

@ray.remote(num_cpus=1)
class Echo:
    def look(self):
        return {"home": os.environ["HOME"], "pid": os.getpid()}
"""


def run_driver(body: str, *arguments: str, environment: dict[str, str] | None = None) -> "subprocess.Popen[str]":
    """A driver in a process of its own: Ray keeps state that no ``ray.shutdown`` undoes."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.Popen(
        [sys.executable, "-c", START_ACTOR + body, *arguments],
        cwd=ROOT,
        env={**clean, **(environment or {})},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def processes_using(root: Path) -> list[psutil.Process]:
    """Every process that the node under ``root`` could have started: they all carry its directory."""
    found = []
    for process in psutil.process_iter():
        try:
            if (
                process.environ().get("RAY_TMPDIR", "").startswith(f"{root}/")
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def wait_until_gone(root: Path, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while (left := processes_using(root)) or root.exists():
        assert time.monotonic() < deadline, f"left behind: {root} exists: {root.exists()}, {left}"
        time.sleep(0.05)


def listening_addresses(processes: list[psutil.Process]) -> set[str]:
    return {
        connection.laddr.ip.removeprefix("::ffff:")
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN or connection.type == 2
    }


@pytest.fixture(scope="module")
def node() -> Iterator[RayNode]:
    """A Ray that runs already, as far as the drivers under test can tell."""
    shared_memory = shared_memory_files()
    with RayNode.start(NodeSpec(cpu_slots=3)) as started:
        root = started.paths.root
        yield started
        assert processes_using(root)
    # close() returns when everything is gone; nothing has to be waited for.
    assert not processes_using(root)
    assert not root.exists()
    assert not left_since(shared_memory)


def test_a_node_listens_on_loopback_and_hides_its_token(node: RayNode) -> None:
    assert node.address.startswith(f"{LOOPBACK}:")
    processes = processes_using(node.paths.root)
    names = {process.name() for process in processes}
    # No dashboard, monitor, log monitor or Ray Client server. The first of them would call out.
    assert names == {"gcs_server", "raylet", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "remuda: ray guardian"}
    assert listening_addresses(processes) == {LOOPBACK}
    assert stat.S_IMODE(node.token_file.stat().st_mode) == 0o600
    assert stat.S_IMODE(node.paths.root.stat().st_mode) == 0o700
    assert len(node.token_file.read_text()) == 64


def test_a_driver_joins_and_leaves_a_ray_that_runs(node: RayNode) -> None:
    body = """
import sys
with RayRuntime.join(sys.argv[1]) as runtime:
    echo = Echo.remote()
    seen = ray.get(echo.look.remote())
    (host,) = runtime.nodes()
    seen |= {"host": runtime.host, "slots": host.cpu_slots, "used": host.used_cpu_slots, "private": runtime.is_private}
    print(json.dumps(seen))
assert "RAY_USAGE_STATS_ENABLED" not in os.environ
"""
    before = {process.pid for process in processes_using(node.paths.root)}
    driver = run_driver(body, node.address, environment=authentication_environment(node.token_file))
    output, errors = driver.communicate(timeout=60)
    assert driver.returncode == 0, errors
    assert errors == "", "a joined Ray says nothing on the terminal"
    seen = json.loads(output)
    assert (seen["host"], seen["slots"], seen["used"], seen["private"]) == (LOOPBACK, 3, 1, False)
    assert seen["home"] == os.environ["HOME"]
    left = {process.pid for process in processes_using(node.paths.root)}
    assert before - left == set(), "close() of a joined runtime must leave Ray running"


@pytest.mark.parametrize(
    "environment",
    [{}, {"RAY_AUTH_TOKEN": "0" * 64}, {"RAY_AUTH_MODE": "disabled"}],
    ids=["no token", "wrong token", "no mode"],
)
def test_without_the_token_nobody_joins(node: RayNode, environment: dict[str, str], tmp_path: Path) -> None:
    body = """
import sys
from cluster.errors import StartFailed
try:
    RayRuntime.join(sys.argv[1])
except StartFailed as error:
    print(error)
"""
    # A HOME without .ray/auth_token.
    driver = run_driver(body, node.address, environment={"HOME": str(tmp_path), **environment})
    output, _ = driver.communicate(timeout=60)
    assert "the Ray there refused us" in output
    assert "set RAY_AUTH_TOKEN_PATH" in output
    assert len(output.splitlines()) == 1


def test_bad_addresses_are_refused_at_once() -> None:
    from cluster.control.ray_runtime import RayRuntime

    for address in ("10.0.0.1", "ray://10.0.0.1:10001", "auto", "host:port", ":6379"):
        with pytest.raises(InvalidOption, match="write HOST:PORT"):
            RayRuntime.join(address)
    with pytest.raises(StartFailed, match="nothing answers there"):
        RayRuntime.join("127.0.0.1:9")


def test_a_killed_process_takes_its_private_ray_along() -> None:
    body = """
import sys
runtime = RayRuntime.start_local(2)
echo = Echo.options(lifetime="detached", name="echo").remote()
seen = ray.get(echo.look.remote())
print(json.dumps({"root": str(runtime._node.paths.root), "guardian": runtime._node.pid, **seen}), flush=True)
sys.stdin.read()
"""
    driver = run_driver(body)
    assert driver.stdout is not None and driver.stderr is not None and driver.stdin is not None
    try:
        seen = json.loads(driver.stdout.readline())
        root = Path(seen["root"])
        assert psutil.pid_exists(seen["pid"])
        assert seen["pid"] in {process.pid for process in psutil.Process(seen["guardian"]).children(recursive=True)}
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait(10)
        for stream in (driver.stdout, driver.stderr, driver.stdin):
            stream.close()
    wait_until_gone(root)
    assert not psutil.pid_exists(seen["pid"])


def test_a_ray_that_cannot_start_says_why_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as parent:
        monkeypatch.setattr(tempfile, "tempdir", parent)
        with pytest.raises(StartFailed, match=r"^Ray did not start: ray start ended with 1: .*negative"):
            RayNode.start(NodeSpec(cpu_slots=-1))
        assert os.listdir(parent) == []


def test_a_guardian_told_to_end_stops_its_node() -> None:
    node = RayNode.start(NodeSpec(cpu_slots=1))
    assert node.pid is not None
    os.kill(node.pid, signal.SIGTERM)
    wait_until_gone(node.paths.root)
    assert node.close() == [], "closing what has ended is harmless; nothing had to be killed"


def test_ray_names_what_is_left_and_leaves_out_what_is_used_up() -> None:
    from cluster.control.ray_runtime import host_info

    node = {"NodeID": "a", "NodeManagerAddress": "10.0.0.1", "Resources": {"CPU": 4.0, "GPU": 2.0, "memory": 1.0}}
    fresh, busy, full = (host_info(node, free) for free in (None, {"CPU": 2.5, "GPU": 2.0}, {"memory": 1.0}))
    assert (fresh.num_free(False), fresh.num_free(True)) == (4, 2), "a node that has not reported yet is free"
    assert (busy.num_free(False), busy.num_free(True)) == (2, 2)
    assert (full.num_free(False), full.num_free(True)) == (0, 0)
