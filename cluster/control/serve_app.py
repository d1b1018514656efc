"""Several replicas on one Ray cluster, managed by Ray Serve: it starts them, replaces those that failed or were drained
and scales by what the leaders' queues say.

A Serve replica is a supervisor, no more: no request and no token passes through Serve. What happens to the gangs is
told to a board in the control process (replica_board.py). Replicas that reach it no more end: Serve itself would keep
them, and start others in their place, long after the control process is gone.
"""

import logging
import threading
import traceback
import uuid
from dataclasses import asdict, fields
from typing import Any

import msgspec
import ray
from ray import serve
from ray._private.state import jobs
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.exceptions import RayServeException
from ray.serve.schema import LoggingConfig

from cluster.control.autoscaling import DOWN_DELAY_S, UP_DELAY_S, ReplicaLoad, wanted_replicas
from cluster.control.next_hosts import measured_links, next_hosts
from cluster.control.placement import place_gangs
from cluster.control.ray_runtime import living_hosts
from cluster.control.replica_board import BoardLink, ReplicaBoard
from cluster.errors import StartFailed
from cluster.replica.events import (
    Event,
    Failed,
    LaunchConfig,
    ReplicaEnded,
)
from cluster.replica.leader_load import LeaderLoad
from cluster.replica.placed_rank import PlacedRank
from cluster.replica.reservations import NotReserved
from cluster.replica.supervisor import Supervisor
from engine.errors import RemudaError
from engine.executor.channel import ChannelClosed

_log = logging.getLogger(__name__)

_POLL_INTERVAL_S = 0.5
_RESERVE_TIMEOUT_S = 10.0
_NUM_PLACEMENTS = 6
"""Replicas that start at the same time may choose the same slots; those that come too late choose again."""
_STOP_MARGIN_S = 30.0
_SERVE_CONTROLLER = "SERVE_CONTROLLER_ACTOR"


class AppConfig(msgspec.Struct, frozen=True):
    """What every replica is given. ``name``: of the application. ``control_job``: the control process's in Ray."""

    launch: LaunchConfig
    name: str
    board_address: str
    board_secret: str
    control_job: str


class GangReplica:
    """One Serve replica: places a gang on what is free, supervises it, and ends with it.

    Args:
        app: an encoded AppConfig.

    Raises ChannelClosed where the board does not answer; Serve tries again.
    """

    def __init__(self, app: bytes) -> None:
        _listen_at_own_address_only()
        self._app = msgspec.msgpack.decode(app, type=AppConfig)
        self._config = self._app.launch
        self._load: LeaderLoad | None = None
        self._ended: str | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._live, name="supervisor", daemon=True)
        try:
            self._board = BoardLink(self._app.board_address, self._app.board_secret)
        except ChannelClosed:
            _delete_if_orphaned(self._app)
            raise
        self._name = self._board.name
        self._thread.start()

    def check_health(self) -> None:
        """Serve replaces a replica that raises here; everything of it has been stopped by then."""
        if self._ended is not None:
            raise RuntimeError(f"replica {self._name} ended: {self._ended}")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For ``scale``."""
        load = self._load
        return {} if load is None else asdict(ReplicaLoad(load.num_running, load.num_waiting, load.max_num_seqs))

    def __del__(self) -> None:
        """Serve calls it when it wants fewer replicas: what runs here may finish first."""
        self._stopping.set()
        if self._thread.is_alive():  # it never was where the constructor raised
            self._thread.join(self._config.drain_timeout_s + _STOP_MARGIN_S)

    def _live(self) -> None:
        supervisor: Supervisor | None = None
        try:
            supervisor = self._start()
            reason = self._watch(supervisor)
        except RemudaError as error:
            reason = str(error)
            self._board.post(Failed(type(error).__name__, str(error), self._name))
        except Exception as error:  # noqa: BLE001  (a defect: it is reported, and the replica replaced)
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}"
            self._board.post(Failed("StartFailed", reason, self._name))
        try:
            if supervisor is not None:
                supervisor.stop()
        finally:
            self._board.post(ReplicaEnded(self._name))
            self._board.close()
            if self._board.is_cut:
                _delete_if_orphaned(self._app)
            self._ended = reason

    def _start(self) -> Supervisor:
        plan, this_host = self._config.replica, ray.util.get_node_ip_address()
        for attempt in range(_NUM_PLACEMENTS):
            (gang,) = place_gangs(
                plan.parallel,
                living_hosts(this_host),
                on_gpus=plan.device == "cuda",
                tp_across_hosts=self._config.tp_across_hosts,
                links=measured_links(self._config),
            )
            ranks = [PlacedRank(rank, host.address) for rank, host in enumerate(gang)]
            supervisor = Supervisor(
                self._name,
                plan,
                ranks,
                this_host,
                self._config.secret,
                next_hosts(self._config, this_host),
                reserve_timeout_s=_RESERVE_TIMEOUT_S,
            )
            try:
                supervisor.start()
            except NotReserved:
                if attempt == _NUM_PLACEMENTS - 1:
                    raise
                continue
            except BaseException:
                supervisor.stop()
                raise
            return supervisor
        raise AssertionError("the last attempt returns or raises")

    def _watch(self, supervisor: Supervisor) -> str:
        """Until the gang fails, has drained or is to stop. Returns why it ended."""
        while not self._stopping.wait(_POLL_INTERVAL_S) and not self._board.is_cut:
            for event in supervisor.poll():
                self._board.post(event)
                if isinstance(event, Failed):
                    return event.message
            self._load = supervisor.load()
            if self._load is not None and self._load.has_drained:
                return "it was drained"
        supervisor.drain(self._config.drain_timeout_s)
        return "it does not reach the control process" if self._board.is_cut else "it was stopped"


def scale(context: Any) -> tuple[int, dict[str, Any]]:
    """Serve's autoscaling policy (ray.serve.config.AutoscalingContext → number of replicas and state)."""
    found: dict[Any, dict[str, float]] = {}
    for name, by_replica in (context.aggregated_metrics or {}).items():
        for replica, value in by_replica.items():
            found.setdefault(replica, {})[name] = value
    loads = [ReplicaLoad(**values) for values in found.values() if len(values) == len(fields(ReplicaLoad))]
    least, most = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
    return wanted_replicas(context.target_num_replicas, loads, least, most), context.policy_state


class ServeApp:
    """The control process's side: deploys the replicas, tells what they report, and removes them.

    Has the same ``start``, ``poll`` and ``stop`` as a Supervisor, for all replicas at once.

    Args:
        host: this host's address, as the replicas reach it.
    """

    def __init__(self, config: LaunchConfig, host: str) -> None:
        self._config = config
        self._host = host
        self._name = f"remuda-{uuid.uuid4().hex[:12]}"
        self._owns_serve = False
        self._is_deployed = False
        self._board: ReplicaBoard | None = None

    def start(self) -> None:
        """Returns once Serve has been told; ``poll`` tells the rest. Raises StartFailed."""
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        try:
            self._owns_serve = not _serve_runs()
            serve.start(proxy_location="Disabled", logging_config=LoggingConfig(log_level="ERROR"))
            board = self._board = ReplicaBoard(self._host)
            job: str = ray.get_runtime_context().get_job_id()
            config = AppConfig(self._config, self._name, board.address, board.secret, job)
            app = self._deployment().bind(msgspec.msgpack.encode(config))
            self._is_deployed = True
            serve.run(app, name=self._name, route_prefix=None)
        except (RayError, RuntimeError, OSError) as error:
            raise StartFailed(f"Ray Serve did not take the replicas: {error}") from error

    def _deployment(self) -> Any:
        config = self._config
        number: dict[str, Any] = {"num_replicas": config.num_replicas}
        if config.max_replicas > config.num_replicas:
            policy = AutoscalingPolicy(policy_function=f"{scale.__module__}:{scale.__name__}")
            number = {
                "autoscaling_config": AutoscalingConfig(
                    min_replicas=config.num_replicas,
                    max_replicas=config.max_replicas,
                    metrics_interval_s=0.5,
                    look_back_period_s=2.0,
                    upscale_delay_s=UP_DELAY_S,
                    downscale_delay_s=DOWN_DELAY_S,
                    policy=policy,
                )
            }
        return serve.deployment(
            name="gang",
            ray_actor_options={"num_cpus": 0},
            health_check_period_s=1.0,
            health_check_timeout_s=30.0,
            graceful_shutdown_timeout_s=config.drain_timeout_s + _STOP_MARGIN_S,
            **number,
        )(GangReplica)

    def poll(self) -> list[Event]:
        """What happened to all replicas since the last call."""
        return [] if self._board is None else self._board.take()

    def stop(self) -> None:
        """End all replicas, and Serve where it was not there before."""
        if self._is_deployed:
            serve.delete(self._name)
        if self._owns_serve:
            serve.shutdown()
        if self._board is not None:
            self._board.close()


def _listen_at_own_address_only() -> None:
    """Every Serve replica opens a port for calls between deployments, which we have none of, on all interfaces
    (``_on_initialized`` in ray/serve/_private/replica.py) and after our constructor. There is no setting for it."""
    from ray.serve._private import replica

    host, add_port = ray.util.get_node_ip_address(), replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: add_port(server, f"{host}:0")


def _delete_if_orphaned(app: AppConfig) -> None:
    """Have Serve end the application whose control process is gone, else it would replace its replicas for ever. Where
    only the way there is cut, others of the application may still serve."""
    try:
        if all(job["IsDead"] for job in jobs() if job["JobID"] == app.control_job):
            _log.warning("the control process of %s is gone; deleting the application", app.name)
            serve.delete(app.name, _blocking=False)
    except (RayError, RayServeException) as error:
        _log.warning("could not delete %s, whose control process may be gone: %s", app.name, error)


def _serve_runs() -> bool:
    try:
        ray.get_actor(_SERVE_CONTROLLER, namespace="serve")
    except ValueError:
        return False
    return True
