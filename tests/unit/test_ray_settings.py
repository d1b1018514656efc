"""The settings of our Ray nodes: what is promised about quiet, privacy and path lengths, without starting any."""

import os
import socket
import stat
from pathlib import Path

import pytest
from ray._private.label_utils import parse_node_labels_string

from cluster.control import ray_node
from cluster.control.node_topology import parse_topology, topology
from cluster.control.ray_settings import (
    LOOPBACK,
    MAX_ROOT_BYTES,
    NodePaths,
    NodeSpec,
    by_hand_defaults,
    driver_environment,
    joining_environment,
    node_environment,
    parse_address,
    start_command,
)
from engine.errors import InvalidOption

PATHS = NodePaths(Path("/tmp/remuda-abcdefgh"))


def environment(base: dict[str, str], spec: NodeSpec | None = None) -> dict[str, str]:
    return node_environment(base, spec or NodeSpec(), PATHS, PATHS.token, Path("/package"))


def test_a_node_inherits_the_callers_environment_but_no_setting_of_another_ray() -> None:
    base = {"PATH": "/bin", "HOME": "/home/user", "RAY_ADDRESS": "1.2.3.4:6379", "RAY_AUTH_TOKEN": "other"}
    made = environment(base)
    assert made["PATH"] == "/bin"
    assert "RAY_ADDRESS" not in made and "RAY_AUTH_TOKEN" not in made
    assert made["RAY_AUTH_MODE"] == "token"
    assert made["RAY_AUTH_TOKEN_PATH"] == str(PATHS.token)
    assert made["HOME"] == "/home/user"
    assert base["RAY_ADDRESS"] == "1.2.3.4:6379", "the caller's mapping is not written to"


def test_our_code_comes_before_the_callers_search_path() -> None:
    assert environment({"PYTHONPATH": "/mine:/yours"})["PYTHONPATH"] == "/package:/mine:/yours"
    assert environment({})["PYTHONPATH"] == "/package"


def test_usage_reports_are_off_and_would_go_nowhere() -> None:
    for made in (environment({}), driver_environment(PATHS.token), joining_environment({})):
        assert made["RAY_USAGE_STATS_ENABLED"] == "0"
        assert made["RAY_USAGE_STATS_REPORT_URL"].startswith(f"http://{LOOPBACK}:")


def test_only_several_hosts_watch_each_other_closely() -> None:
    name = "RAY_health_check_timeout_ms"
    assert name not in environment({})
    assert environment({}, NodeSpec(several_hosts=True))[name] == "1000"


def test_heads_and_others_get_their_own_options() -> None:
    head = start_command(NodeSpec(cpu_slots=3), PATHS, "python")
    other = start_command(NodeSpec("10.0.0.2", head_address="10.0.0.1:6379", num_gpus=2), PATHS, "python")
    assert head[:4] == other[:4] == ["python", "-m", "cluster.control.ray_runtime", "start"]
    assert {"--head", "--num-cpus=3", f"--node-ip-address={LOOPBACK}", "--include-dashboard=False"} <= set(head)
    assert {"--address=10.0.0.1:6379", "--num-gpus=2", "--node-ip-address=10.0.0.2"} <= set(other)
    assert not {"--head", "--port=0", "--no-monitor"} & set(other)
    assert not any(option.startswith("--num-gpus") for option in head), "Ray counts the GPUs itself"


def test_where_a_node_stands_is_said_by_labels_that_ray_takes() -> None:
    spec = NodeSpec(topology=parse_topology("zone-a//rack-3"))
    (labels,) = [option for option in start_command(spec, PATHS, "python") if option.startswith("--labels=")]
    taken = parse_node_labels_string(labels.removeprefix("--labels="))
    assert topology(taken) == ("zone-a", "rack-3")
    assert topology({"ray.io/availability-zone": "a", "ray.io/availability-region": "r"}) == ("r", "a")
    assert not any(option.startswith("--labels") for option in start_command(NodeSpec(), PATHS, "python"))


@pytest.mark.parametrize("text", ["zone a", "zone-a/rack_", "/".join("abcdefghij")])
def test_a_place_that_ray_would_not_take_is_refused(text: str) -> None:
    with pytest.raises(InvalidOption, match="zone-a/rack-3"):
        parse_topology(text)


def test_the_longest_directory_still_leaves_room_for_rays_sockets(tmp_path: Path) -> None:
    base = f"/tmp/rmd-{os.getpid()}-"
    root = Path(base + "x" * (MAX_ROOT_BYTES - len(base)))
    paths = NodePaths(root)
    sockets = paths.temporary / "session_2026-12-31_23-59-59_999999_4194304" / "sockets"
    sockets.mkdir(parents=True)
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(sockets / "plasma_store"))
    finally:
        ray_node.shutil.rmtree(root)
    with pytest.raises(ValueError, match=f"leave at most {MAX_ROOT_BYTES}"):
        NodePaths(Path(f"{root}x"))


def test_a_new_directory_is_private() -> None:
    paths = ray_node.make_directory()
    ray_node.write_private(paths.token, "secret")
    try:
        assert stat.S_IMODE(paths.root.stat().st_mode) == 0o700
        assert stat.S_IMODE(paths.token.stat().st_mode) == 0o600
    finally:
        ray_node.shutil.rmtree(paths.root)


def test_a_long_temporary_directory_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ray_node.tempfile, "gettempdir", lambda: str(tmp_path / ("long" * 20)))
    paths = ray_node.make_directory()
    ray_node.shutil.rmtree(paths.root)
    assert paths.root.parent == Path("/tmp")


def test_a_token_that_is_there_is_used_when_joining(tmp_path: Path) -> None:
    without = {"HOME": str(tmp_path)}
    assert joining_environment(without)["RAY_AUTH_MODE"] == "disabled"
    assert joining_environment({**without, "RAY_AUTH_TOKEN": "t"})["RAY_AUTH_MODE"] == "token"
    assert joining_environment({**without, "RAY_AUTH_TOKEN_PATH": "/t"})["RAY_AUTH_MODE"] == "token"
    assert joining_environment({**without, "RAY_AUTH_TOKEN": "t", "RAY_AUTH_MODE": "disabled"})["RAY_AUTH_MODE"] == (
        "disabled"
    )
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("t")
    assert joining_environment(without)["RAY_AUTH_MODE"] == "token"


@pytest.mark.parametrize("address", ["10.0.0.1:6379", "host.example:1", "[fd77::1]:65535"])
def test_addresses(address: str) -> None:
    host, port = parse_address(address)
    assert f"{host}:{port}" == address


@pytest.mark.parametrize("address", ["", "auto", "10.0.0.1", ":6379", "h:0", "h:65536", "h:x", "ray://h:1"])
def test_what_is_not_an_address_is_named(address: str) -> None:
    with pytest.raises(InvalidOption, match="write HOST:PORT") as refusal:
        parse_address(address)
    assert f"--address {address}:" in str(refusal.value)


def test_a_node_started_by_hand_notices_silence_unless_it_is_alone() -> None:
    several = by_hand_defaults(["--head", "--node-ip-address=10.0.0.1"])
    assert several["RAY_health_check_period_ms"] == "500"
    assert several["RAY_memory_monitor_refresh_ms"] == several["RAY_USAGE_STATS_ENABLED"] == "0"
    alone = by_hand_defaults(["--head", "--node-ip-address=127.0.0.1"])
    # A busy machine of its own is not to be taken for a dead one.
    assert not [name for name in alone if "health_check" in name]
