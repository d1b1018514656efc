"""This process as a Ray driver: on a private Ray of its own, or on one that was running already.

Also the command ``python -m cluster.control.ray_runtime start …``, which is ``ray start`` with less (``start_node``).
"""

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import ray
from ray._private import services
from ray._private.state import available_resources_per_node
from ray._raylet import AuthenticationTokenLoader, Config, GcsClient
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.control.host_calls import HostAnswer, HostCall, run_named
from cluster.control.node_topology import topology
from cluster.control.placement import HostInfo
from cluster.control.ray_node import RayNode
from cluster.control.ray_settings import (
    DEFAULT_CPU_SLOTS,
    LOOPBACK,
    NodeSpec,
    by_hand_defaults,
    driver_environment,
    joining_environment,
    parse_address,
)
from cluster.errors import StartFailed
from cluster.replica.fabric import local_addresses

NAMESPACE = "remuda"
CONNECT_TIMEOUT_S = 3.0
CLUSTER_ANSWER_TIMEOUT_S = 10.0

# Of the client that asks for the nodes before the driver connects.
_CONNECT_ERRORS = (RayError, RuntimeError, ConnectionError, TimeoutError, ValueError)


class RayRuntime:
    """The driver's connection, and the Ray node under it where we started that.

    A process has at most one at a time, as Ray has. Call ``close``, or use it as a context manager.

    Attributes:
        host: this host's address, as the cluster's other hosts reach it.
        address: host:port of the cluster.
        start_s: seconds that it took to start or find Ray and to connect.
    """

    def __init__(self, node: RayNode | None, address: str, host: str, environment: Mapping[str, str]) -> None:
        started_s = time.monotonic()
        self._node = node
        self.address = address
        self.host = host
        self._former = set_environment(environment)
        try:
            connect(address, host)
        except BaseException:
            self.close()
            raise
        self.start_s = time.monotonic() - started_s + (node.start_s if node is not None else 0.0)

    @classmethod
    def start_local(cls, cpu_slots: int = DEFAULT_CPU_SLOTS) -> "RayRuntime":
        """Start a private Ray on this host that only this host can reach, and connect to it.

        Raises:
            StartFailed: Ray did not start; the message holds what it printed.
        """
        node = RayNode.start(NodeSpec(node_ip=LOOPBACK, cpu_slots=cpu_slots))
        return cls(node, node.address, LOOPBACK, driver_environment(node.token_file))

    @classmethod
    def join(cls, address: str) -> "RayRuntime":
        """Connect to a Ray that runs already; this host must be one of its nodes. ``close`` leaves it running.

        The cluster's token is found as Ray's own tools find it: ``RAY_AUTH_TOKEN``, ``RAY_AUTH_TOKEN_PATH`` or
        ``~/.ray/auth_token``.

        Raises:
            InvalidOption: ``address`` is not host:port.
            StartFailed: no Ray answers there, it refuses our token, or this host is not one of its nodes.
        """
        host, port = parse_address(address)
        check_listener(host, port)
        environment = joining_environment(os.environ)
        former = set_environment(environment)
        try:
            local = local_node_address(address)
        finally:
            restore_environment(former)
        return cls(None, address, local, environment)

    @property
    def is_private(self) -> bool:
        """Whether the Ray is ours, and ends with ``close``."""
        return self._node is not None

    def nodes(self) -> list[HostInfo]:
        """The living hosts, with what is free on each at this moment; this host first, then by address.

        Raises:
            StartFailed: the cluster does not answer.
        """
        return living_hosts(self.host)

    def call(self, calls: Sequence[HostCall], timeout_s: float) -> list[HostAnswer]:
        """Run a function on each call's host, all at the same time (see HostCalls). A CPU call takes no slot of the
        host's, so it also runs where all are in use; one on a GPU waits for a free one."""
        references = [start_call(call) for call in calls]
        ray.wait(references, num_returns=len(references), timeout=timeout_s)
        answers = [answer_of(reference, timeout_s) for reference in references]
        for reference, answer in zip(references, answers, strict=True):
            if answer.error is not None:
                ray.cancel(reference, force=True)
        return answers

    def close(self) -> None:
        """Disconnect, stop the Ray that we started and remove its files. May be called twice."""
        ray.shutdown()
        node, self._node = self._node, None
        try:
            if node is not None:
                node.close()
        finally:
            restore_environment(self._former)
            self._former = {}

    def __enter__(self) -> "RayRuntime":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def start_call(call: HostCall) -> Any:
    """Ray's reference of the answer."""
    remote = ray.remote(run_named).options(
        num_cpus=0,
        num_gpus=1 if call.on_gpu else 0,
        max_retries=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(call.host.node_id, soft=False),
    )
    return remote.remote(call.function, call.argument)


def answer_of(reference: Any, timeout_s: float) -> HostAnswer:
    """Of a call that has ended, or has had its time."""
    try:
        return HostAnswer(ray.get(reference, timeout=0))
    except GetTimeoutError:
        return HostAnswer(error=f"did not answer within {timeout_s:.0f} s")
    except RayError as error:
        return HostAnswer(error=last_line(error))


def living_hosts(this_host: str) -> list[HostInfo]:
    """The cluster's hosts, with what is free on each at this moment; this host first, then by address.

    Raises:
        StartFailed: the cluster does not answer.
    """
    try:
        free = available_resources_per_node()
        hosts = [host_info(node, free.get(node["NodeID"])) for node in ray.nodes() if node["Alive"]]
    except RayError as error:
        raise StartFailed(f"the Ray cluster does not answer: {error}") from error
    return sorted(hosts, key=lambda host: (host.address != this_host, host.address, host.node_id))


def host_info(node: Mapping[str, Any], free: Mapping[str, float] | None) -> HostInfo:
    """Ray's description of a node and of its free resources → ours. Fractions of a slot count as used.

    Args:
        free: leaves out what is used up; None for a node that has only just joined and not reported yet.
    """
    total: Mapping[str, float] = node["Resources"]
    free = total if free is None else free
    cpu_slots, num_gpus = int(total.get("CPU", 0)), int(total.get("GPU", 0))
    return HostInfo(
        node_id=node["NodeID"],
        address=node["NodeManagerAddress"],
        cpu_slots=cpu_slots,
        num_gpus=num_gpus,
        used_cpu_slots=cpu_slots - int(free.get("CPU", 0)),
        used_gpus=num_gpus - int(free.get("GPU", 0)),
        topology=topology(node.get("Labels") or {}),
    )


def connect(address: str, host: str) -> None:
    """``ray.init`` without output, without a changed SIGTERM handler, and without leaving the loopback.

    Raises:
        StartFailed: Ray refused.
    """
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        with loopback_kept(), signal_handler_kept():
            ray.init(
                address=address,
                namespace=NAMESPACE,
                log_to_driver=False,
                configure_logging=False,
                _node_ip_address=host,
            )
    except _CONNECT_ERRORS as error:
        raise StartFailed(f"cannot connect to Ray at {address}: {first_line(error)}") from error


@contextmanager
def loopback_kept() -> Iterator[None]:
    """Let Ray take 127.0.0.1 for what it is. It would replace it by an address that the whole network can reach."""
    original = services.resolve_ip_for_localhost
    services.resolve_ip_for_localhost = lambda host: host
    try:
        yield
    finally:
        services.resolve_ip_for_localhost = original


@contextmanager
def signal_handler_kept() -> Iterator[None]:
    """Keep this process's SIGTERM handler: Ray's would end the process without draining or cleaning up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    original = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, original)


def check_listener(host: str, port: int) -> None:
    """Raise StartFailed unless something accepts connections there. Ray itself would try for minutes."""
    try:
        socket.create_connection((host, port), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise StartFailed(
            f"--address {host}:{port}: nothing answers there ({error.strerror or error}); start Ray there, or leave "
            f"--address out to start a private one"
        ) from error


def local_node_address(address: str) -> str:
    """The address under which the cluster knows this host.

    Raises:
        StartFailed: the cluster refused our token, did not answer, or has no node on this host.
    """
    try:
        nodes = GcsClient(address=address).get_all_node_info(timeout=CLUSTER_ANSWER_TIMEOUT_S)
    except _CONNECT_ERRORS as error:
        raise StartFailed(
            f"--address {address}: the Ray there refused us: {first_line(error)}. Where it has token authentication, "
            f"set RAY_AUTH_TOKEN_PATH to a file with its token; versions of Ray and Python must be equal"
        ) from error
    alive: list[str] = [info.node_manager_address for info in nodes.values() if info.state == 0]
    here = local_addresses()
    local = next((node_address for node_address in alive if node_address in here), None)
    if local is None:
        raise StartFailed(
            f"--address {address}: this host is not a node of that Ray; run remuda serve on one of "
            f"{', '.join(sorted(alive)) or 'its hosts (none is alive)'}"
        )
    return local


def is_member(address: str, node_ip: str) -> bool:
    """Whether the cluster counts a living node with this address.

    Raises:
        StartFailed: it does not answer, or refused our token.
    """
    try:
        nodes = GcsClient(address=address).get_all_node_info(timeout=CLUSTER_ANSWER_TIMEOUT_S)
    except _CONNECT_ERRORS as error:
        raise StartFailed(f"the Ray at {address} does not answer: {first_line(error)}") from error
    return any(info.state == 0 and info.node_manager_address == node_ip for info in nodes.values())


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def last_line(error: BaseException) -> str:
    """Of a failure on another host: Ray's text holds its traceback, whose last line says what it was."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


def set_environment(environment: Mapping[str, str]) -> dict[str, str | None]:
    """Set these variables and let Ray read them anew. Returns what they were."""
    former = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    refresh_ray()
    return former


def restore_environment(former: Mapping[str, str | None]) -> None:
    for name, value in former.items():
        if value is not None:
            os.environ[name] = value
        else:
            os.environ.pop(name, None)
    refresh_ray()


def refresh_ray() -> None:
    """Ray keeps its configuration and the token from when it first looked."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def start_node(arguments: list[str]) -> NoReturn:
    """``ray start`` with these arguments, without what nobody here asked for. Never returns: it ends the process.

    * No API server on a head: it would call out (ray_settings.py), and only the dashboard needs it. Ray goes on
      without it as it does where it fails to start.
    * No Ray Client server, for which ``ray start`` has no switch.
    * 127.0.0.1 stays 127.0.0.1: ``ray start`` would replace it by an address that the network can reach, and listen
      there.
    * The node is small, reports nothing, and notices a silent host in seconds, unless the environment says otherwise.
    * The modules behind Ray's other commands are not imported. They take twice the time of the rest.
    """
    for name, value in by_hand_defaults(arguments).items():
        os.environ.setdefault(name, value)
    for other_commands in ("ray.serve.scripts", "ray.dashboard.modules.job.cli", "ray.util.state.state_cli"):
        # What Python keeps for "this cannot be imported"; Ray then leaves those commands out.
        sys.modules[other_commands] = None  # type: ignore[assignment]
    from ray.scripts import scripts

    services.start_api_server = no_api_server
    services.resolve_ip_for_localhost = lambda host: host
    scripts.get_ray_client_dependency_error = lambda: ImportError("not wanted")
    scripts.start.main(arguments, prog_name="ray start")
    sys.exit(0)


def no_api_server(*args: Any, **kwargs: Any) -> tuple[None, None]:
    """What ``ray._private.services.start_api_server`` returns where it started none: no address and no process."""
    return None, None


if __name__ == "__main__":
    assert sys.argv[1] == "start", "the only command"
    start_node(sys.argv[2:])
