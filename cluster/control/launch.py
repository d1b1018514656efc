"""The control process: starts or joins Ray, places the gangs, supervises them, and undoes all of it.

``python -m cluster.cli.control_process FD``: configuration as one JSON line on standard input, events as JSON lines to
the file descriptor FD. Standard input's end is the order to stop.
"""

import importlib
import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import ModuleType
from typing import IO, TYPE_CHECKING

import setproctitle

from cluster.control.device_choice import with_device
from cluster.control.host_calls import HostCalls
from cluster.control.nearby import MeasureLinks, place_nearby
from cluster.control.next_hosts import next_hosts
from cluster.control.placement import HostInfo
from cluster.control.ray_runtime import RayRuntime
from cluster.replica.events import (
    Event,
    Failed,
    LaunchConfig,
    MemoryPlanned,
    Notice,
    PhaseStarted,
    ReplicaPlan,
    ReplicaReady,
    Stopped,
    decode_config,
    encode_event,
)
from cluster.replica.placed_rank import PlacedRank
from cluster.telemetry.logs import log_as_json
from engine.errors import RemudaError

if TYPE_CHECKING:
    from cluster.control.serve_app import ServeApp
    from cluster.replica.supervisor import Supervisor

Examine = Callable[[HostCalls, ReplicaPlan, Sequence[Sequence[HostInfo]], MemoryPlanned], list[str]]
"""Whether the hosts of the gangs' ranks are fit. Returns warnings; raises StartFailed where one is not."""

START_POLL_INTERVAL_S = 0.1
POLL_INTERVAL_S = 0.5
"""Once all replicas are ready: a call through Ray is not free, and news are rare."""


class EventWriter:
    """Events go out as they happen; a reader that is gone does not stop the clean-up."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def send(self, event: Event) -> None:
        try:
            self._stream.write(encode_event(event))
            self._stream.flush()
        except BrokenPipeError:
            pass  # The reader died; standard input has ended too, so the stop is under way.


class Launch:
    """One run of the control process."""

    def __init__(
        self,
        config: LaunchConfig,
        events: EventWriter,
        stop: threading.Event,
        examine: Examine | None,
        measure_links: MeasureLinks | None,
    ) -> None:
        self._config = config
        self._examine = examine
        self._measure_links = measure_links
        self._events = events
        self._stop = stop
        self._runtime: RayRuntime | None = None
        self._gangs: Supervisor | ServeApp | None = None

    def run(self) -> None:
        """Returns when ``stop`` is set; everything is still running then, until ``close``."""
        with ThreadPoolExecutor(1) as pool:
            prepared: Future[ModuleType] = pool.submit(_prepare, self._config.replica)
            self._events.send(PhaseStarted("ray" if self._config.address is None else "join"))
            self._runtime = self._start_runtime()
            self._await_hosts(self._runtime)
            supervisor_class = prepared.result().Supervisor
        if self._stop.is_set():
            return
        self._events.send(PhaseStarted("placement"))
        self._choose_device(self._runtime)
        gangs, config = place_nearby(self._runtime, self._config, self._measure_links)
        self._config = config
        planned = self._plan_memory(gangs, self._runtime.host)
        self._events.send(planned)
        for warning in self._examine(self._runtime, config.replica, gangs, planned) if self._examine else ():
            self._events.send(Notice(warning))
        if config.is_managed:
            self._begin(self._serve_app(self._runtime.host))
        else:
            (hosts,) = gangs
            ranks = [PlacedRank(rank, host.address) for rank, host in enumerate(hosts)]
            host = self._runtime.host
            choose = next_hosts(config, host)
            self._begin(supervisor_class("r0", config.replica, ranks, host, config.secret, choose))
        self._watch()

    def _serve_app(self, this_host: str) -> "ServeApp":
        # Only where it is needed: importing Ray Serve takes a second.
        from cluster.control.serve_app import ServeApp

        return ServeApp(self._config, this_host)

    def _begin(self, gangs: "Supervisor | ServeApp") -> None:
        if not self._stop.is_set():
            self._gangs = gangs
            gangs.start()

    def _start_runtime(self) -> RayRuntime:
        if self._config.address is None:
            return RayRuntime.start_local(self._config.cpu_slots)
        return RayRuntime.join(self._config.address)

    def _await_hosts(self, runtime: RayRuntime) -> None:
        """Until the Ray cluster has all its hosts, however long the last one takes, or until ``stop`` is set."""
        num_hosts = self._config.num_hosts
        if num_hosts > 1:
            self._events.send(PhaseStarted("hosts"))
        while len(runtime.nodes()) < num_hosts and not self._stop.wait(POLL_INTERVAL_S):
            pass

    def _choose_device(self, runtime: RayRuntime) -> None:
        """Where the user left it to the cluster's hosts."""
        if self._config.on_gpus is not None:
            self._config = with_device(self._config, runtime.nodes())
            device = self._config.replica.device
            self._events.send(Notice(f"ranks run on {device}, by what the cluster's hosts have (--device auto)"))

    def _plan_memory(self, gangs: list[list[HostInfo]], this_host: str) -> MemoryPlanned:
        """Before any actor is created. Raises DoesNotFit."""
        # It needs torch, which _prepare has imported meanwhile.
        from cluster.control.memory import plan_memory

        num_local_ranks = sum(host.address == this_host for hosts in gangs for host in hosts)
        return plan_memory(self._config.replica, num_local_ranks)

    def _watch(self) -> None:
        num_starting = self._config.num_replicas
        while not self._stop.wait(START_POLL_INTERVAL_S if num_starting > 0 else POLL_INTERVAL_S):
            for event in self._gangs.poll() if self._gangs is not None else []:
                self._events.send(event)
                num_starting -= isinstance(event, ReplicaReady)

    def close(self) -> None:
        """Stop the replicas, then Ray; every part is tried even if another fails."""
        if self._gangs is not None:
            try:
                self._gangs.stop()
            except Exception:  # noqa: BLE001  (the rest is stopped all the same)
                traceback.print_exc()
        if self._runtime is not None:
            self._runtime.close()


def _prepare(plan: ReplicaPlan) -> ModuleType:
    """While Ray starts: import what needs torch, which takes seconds, and look through the checkpoint's headers."""
    module = importlib.import_module("cluster.replica.supervisor")
    importlib.import_module("cluster.replica.checkpoint").check_checkpoint(plan)
    return module


def main(examine: Examine | None = None, measure_links: MeasureLinks | None = None) -> int:
    """Runs until standard input ends. Exit status 0 after a stop that was asked for, 1 after a failure."""
    setproctitle.setproctitle("remuda: control")
    # Before torch is imported: the store warns on the terminal that it has no name for its own address.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    events = EventWriter(os.fdopen(int(sys.argv[1]), "wb"))
    # Unbuffered: while the thread waits in a buffered read it holds a lock that the interpreter's own end would want.
    commands = os.fdopen(sys.stdin.fileno(), "rb", buffering=0, closefd=False)
    config = decode_config(commands.readline())
    if config.replica.log_format == "json":
        log_as_json("remuda-control")
    stop = threading.Event()
    threading.Thread(target=_set_at_end, args=(commands, stop), daemon=True).start()
    launch = Launch(config, events, stop, examine, measure_links)
    status = 0
    try:
        launch.run()
    except RemudaError as error:
        events.send(Failed(type(error).__name__, str(error)))
        status = 1
    except Exception as error:  # noqa: BLE001  (whatever it was, it is reported)
        # A defect of ours: the user gets one line, whoever mends it needs the trace.
        traceback.print_exc()
        events.send(Failed("StartFailed", f"{type(error).__name__}: {error}"))
        status = 1
    finally:
        launch.close()
        events.send(Stopped())
    return status


def _set_at_end(stream: IO[bytes], stop: threading.Event) -> None:
    while stream.read(4096):
        pass
    stop.set()
