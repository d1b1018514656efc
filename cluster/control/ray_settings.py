"""The environment, paths and commands of every Ray node that Remuda starts. Pure: no Ray, no process, no clock.

Three promises are kept here and in ``ray_runtime.start_node``, and nowhere else:

* **Nothing leaves the machine.** Ray's API server asks the clouds' metadata addresses who it runs on at every start of
  a head, even with ``RAY_USAGE_STATS_ENABLED=0`` and without the dashboard that it is for
  (``ray/_common/usage/usage_lib.py``, ``get_cluster_config_to_report``). Ours is never started.
* **Nothing strange gets in.** Token authentication is on; a local node listens on 127.0.0.1 only; ``RAY_*`` settings
  of the user's shell, made for some other cluster, are not inherited.
* **It is small and quick.** No dashboard, autoscaler monitor, log monitor or Ray Client server, a small object store,
  and no worker processes started ahead of need.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.control.node_topology import topology_labels
from engine.errors import InvalidOption

LOOPBACK = "127.0.0.1"
DEFAULT_CPU_SLOTS = 8

# Ray never carries a token of ours; 75 MiB is the least that Ray accepts.
OBJECT_STORE_MEMORY_BYTES = 80 * 1024 * 1024

# sun_path of a Unix socket holds 107 bytes and the end mark. The longest that Ray makes is below.
MAX_SOCKET_PATH_BYTES = 107
RAY_SOCKET_SUFFIX_BYTES = len("/r/session_YYYY-MM-DD_HH-MM-SS_uuuuuu_ppppppp/sockets/plasma_store")
MAX_ROOT_BYTES = MAX_SOCKET_PATH_BYTES - RAY_SOCKET_SUFFIX_BYTES

_SHUT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_USAGE_STATS_PROMPT_ENABLED": "0",
    # Port 9 of the loopback: should a report ever be sent, it goes nowhere.
    "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9/",
}
_SMALL = {
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_num_prestart_python_workers": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_metrics_report_interval_ms": "0",
    "RAY_enable_metrics_collection": "0",
    # A record of tasks for the dashboard, sent once a second.
    "RAY_task_events_report_interval_ms": "0",
    # Ray's default, 15, lets whatever else runs on a host go before its ranks.
    "RAY_worker_niceness": "0",
    "OMP_NUM_THREADS": "1",
}
# Ray's processes end themselves when they have not reached the control service for a minute (its default). Ours need it
# only to start and to replace processes; what runs can run on without it.
_PATIENT = {"RAY_gcs_rpc_server_reconnect_timeout_s": str(30 * 24 * 3600)}
_BRIEF = {
    # Tries of a driver to connect: a Ray that answers does so at the first.
    "RAY_gcs_server_port_wait_time_s": "3",
}
# Ray's defaults see a silent host after a minute. For one host they do not matter; among several they do.
_QUICK_TO_NOTICE = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
CHECKED_SETTINGS = (
    *_QUICK_TO_NOTICE,
    "RAY_memory_monitor_refresh_ms",
    "RAY_worker_niceness",
    "RAY_USAGE_STATS_ENABLED",
    "RAY_AUTH_MODE",
)
"""What is looked at on the hosts of a Ray that somebody else started."""


@dataclass(frozen=True)
class NodePaths:
    """Where one Ray node that we started keeps its files. Everything lies under ``root`` (mode 0700)."""

    root: Path

    def __post_init__(self) -> None:
        length = len(str(self.root).encode())
        if length > MAX_ROOT_BYTES:
            raise ValueError(
                f"the directory {self.root} has {length} bytes; Ray's socket paths leave at most {MAX_ROOT_BYTES}"
            )

    @property
    def temporary(self) -> Path:
        """Ray's own directory. Ray makes it writable for everybody (mode 0777), so it must not be ``root``."""
        return self.root / "r"

    @property
    def token(self) -> Path:
        """The cluster's authentication token (mode 0600)."""
        return self.root / "token"

    @property
    def log(self) -> Path:
        """What ``ray start`` printed."""
        return self.root / "start.log"

    @property
    def address(self) -> Path:
        """Ray writes host:port of the cluster here once the node is up."""
        return self.temporary / "ray_current_cluster"


@dataclass(frozen=True)
class NodeSpec:
    """One Ray node to start.

    Attributes:
        node_ip: the address other nodes and the ranks use for it.
        cpu_slots: Ray's CPU resource: how many CPU ranks (one thread each) may run here.
        head_address: host:port of the cluster to join; None starts a head.
        port: where a head listens; 0 takes a free one.
        num_gpus: None lets Ray count the GPUs.
        several_hosts: notice a silent host in seconds, as a cluster over several hosts needs it.
        topology: where it stands, from the widest to the narrowest.
    """

    node_ip: str = LOOPBACK
    cpu_slots: int = DEFAULT_CPU_SLOTS
    head_address: str | None = None
    port: int = 0
    num_gpus: int | None = None
    several_hosts: bool = False
    topology: tuple[str, ...] = ()


def authentication_environment(token_file: Path) -> dict[str, str]:
    """Variables with which a process joins a cluster that has token authentication."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_file)}


def driver_environment(token_file: Path) -> dict[str, str]:
    """Variables that a process sets for itself before it connects to a node we started."""
    return {**_SHUT, **_SMALL, **_BRIEF, **_PATIENT, **authentication_environment(token_file)}


def joining_environment(base: Mapping[str, str]) -> dict[str, str]:
    """Variables that a process sets for itself before it joins a Ray that it did not start.

    Ray looks for a token only in token mode, and an explicit address does not switch that on; a token that is there
    is meant to be used.
    """
    default_token = Path(base.get("HOME", "/")) / ".ray" / "auth_token"
    has_token = "RAY_AUTH_TOKEN" in base or "RAY_AUTH_TOKEN_PATH" in base or default_token.is_file()
    mode = base.get("RAY_AUTH_MODE") or ("token" if has_token else "disabled")
    return {**_SHUT, **_BRIEF, **_PATIENT, "RAY_AUTH_MODE": mode}


def parse_address(address: str) -> tuple[str, int]:
    """``HOST:PORT`` of a running Ray, as the user wrote it.

    Raises:
        InvalidOption: it is something else.
    """
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InvalidOption(f"--address {address}: write HOST:PORT of a running Ray, for example 10.0.0.1:6379")
    return host, int(port)


def node_environment(
    base: Mapping[str, str], spec: NodeSpec, paths: NodePaths, token_file: Path, package_root: Path
) -> dict[str, str]:
    """The whole environment in which one Ray node is started.

    Args:
        base: the caller's environment; its ``RAY_*`` variables are left out.
        token_file: the cluster's token (``paths.token`` on its head).
        package_root: the directory that holds the ``cluster`` package, so that every worker finds the code of
            its actor, installed or not.
    """
    environment = {name: value for name, value in base.items() if not name.startswith("RAY_")}
    environment |= _SHUT | _SMALL | _PATIENT | authentication_environment(token_file)
    if spec.several_hosts:
        environment |= _QUICK_TO_NOTICE
    search_path = [str(package_root), *filter(None, [base.get("PYTHONPATH")])]
    environment |= {"PYTHONPATH": ":".join(search_path), "RAY_TMPDIR": str(paths.temporary)}
    return environment


def by_hand_defaults(arguments: Sequence[str]) -> dict[str, str]:
    """Variables for ``ray start`` with these arguments by hand, where they are not set already. On the loopback a node
    has no other host to notice, and is given its environment whole by ``node_environment``."""
    is_alone = any(argument == f"--node-ip-address={LOOPBACK}" for argument in arguments)
    return _SHUT | _SMALL | _PATIENT | ({} if is_alone else _QUICK_TO_NOTICE)


def start_command(spec: NodeSpec, paths: NodePaths, python: str = sys.executable) -> list[str]:
    """The command that starts one node. It ends once the node is up; the node's processes stay."""
    command = [
        python, "-m", "cluster.control.ray_runtime", "start",
        f"--node-ip-address={spec.node_ip}",
        f"--node-name={spec.node_ip}",
        f"--temp-dir={paths.temporary}",
        f"--num-cpus={spec.cpu_slots}",
        f"--object-store-memory={OBJECT_STORE_MEMORY_BYTES}",
        "--include-log-monitor=False",
        "--dashboard-agent-listen-port=0",
        "--disable-usage-stats",
        "--log-style=record",
        "--log-color=false",
    ]  # fmt: skip
    if spec.num_gpus is not None:
        command.append(f"--num-gpus={spec.num_gpus}")
    if spec.topology:
        labels = topology_labels(spec.topology)
        command.append(f"--labels={','.join(f'{name}={value}' for name, value in labels.items())}")
    if spec.head_address is None:
        command += ["--head", f"--port={spec.port}", "--include-dashboard=False", "--no-monitor"]
    else:
        command.append(f"--address={spec.head_address}")
    return command
