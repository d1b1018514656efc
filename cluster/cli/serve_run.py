"""How ``remuda serve`` runs: check, open the ports, start the gangs with a progress bar, serve, and stop everything."""

import asyncio
import functools
import signal
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import uvloop
from opentelemetry.trace import Tracer
from rich.console import Console

from cluster.cli.console import open_console
from cluster.cli.progress import StartProgress
from cluster.config import Device, ServeConfig, misspelt_variables
from cluster.control.launcher import Launcher
from cluster.control.preflight import Preflight, preflight
from cluster.errors import Unavailable
from cluster.frontend.app import FrontEnd, FrontEndConfig
from cluster.frontend.calls import TimeLimits
from cluster.frontend.fleet import Fleet
from cluster.identity.config import load_security
from cluster.licence import licence_of
from cluster.replica.client import ReplicaClient
from cluster.replica.events import Failed, GangFormed, Notice, Repairing, ReplicaEnded, ReplicaReady
from cluster.replica.heap import settle_heap
from cluster.telemetry.tracing import NO_TRACER, open_telemetry
from cluster.tenants.tenancy import TenancyConfig
from engine.errors import RemudaError
from engine.kernels.native_library import is_built

CONTROL_PROCESS = "cluster.cli.control_process"
JOIN_INTERVAL_S = 1.0
"""Between attempts to reach a leader that says it is ready."""


def run(config: ServeConfig) -> int:
    """Serve until SIGINT or SIGTERM. Status 0; 1 if that came before it was ready, or if no replica was left to serve.

    Raises errors of our tree."""
    console = open_console(config.log_format, "remuda-frontend")
    for warning in misspelt_variables():
        console.print(warning, style="yellow")
    checked = preflight(config)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        telemetry = open_telemetry(checked.launch.replica.otlp_endpoint, "remuda-frontend", new_front_end_id())
        front_end = functools.partial(FrontEnd, front_end_config(config, checked.directory), telemetry=telemetry)
        return runner.run(Serving(console, config, checked, front_end, telemetry.tracer).run())


def new_front_end_id() -> str:
    """A name for one life of a front end."""
    return f"front-end-{uuid.uuid4().hex[:12]}"


def front_end_config(config: ServeConfig, directory: Path) -> FrontEndConfig:
    """Of the options of ``remuda serve`` those that a front end needs. ``directory``: the checkpoint's. Raises
    InvalidOption."""
    return FrontEndConfig(
        name=config.name,
        model_path=directory,
        host=config.host,
        port=config.port,
        grpc_port=config.grpc_port,
        security=load_security(config.security_file, config.api_key_file),
        insecure=config.insecure,
        tenancy=TenancyConfig(
            config.tenants,
            config.limits_store,
            config.limits_store_password_file,
            config.usage_log,
            config.audit_log,
        ),
        lora_dir=config.lora_dir,
        max_lora_rank=config.max_lora_rank,
        pooling=config.pooling,
        guided_decoding_backend=config.guided_decoding_backend,
        limits=TimeLimits(config.request_timeout, config.queue_timeout, config.first_token_timeout),
    )


class Front(Protocol):
    """What clients or probes reach: a front end, or its health endpoints alone."""

    @property
    def addresses(self) -> str: ...

    async def start(self) -> None: ...

    async def drain(self, timeout_s: float) -> bool: ...

    async def stop(self, *, reason: RemudaError | None) -> None: ...


class Serving:
    """One run, from open ports to the end. While the model loads, the health endpoints answer already."""

    def __init__(
        self,
        console: Console,
        config: ServeConfig,
        checked: Preflight,
        new_front: Callable[[Fleet], Front],
        tracer: Tracer = NO_TRACER,
    ) -> None:
        self._tracer = tracer
        self._console = console
        self._new_front = new_front
        self._config = config
        self._checked = checked
        self._front_end_id = new_front_end_id()
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._is_ready = False
        self._joining: dict[str, asyncio.Task[None]] = {}
        """By replica: its newest leader, until it was reached."""
        self._status = 0
        self._reason: RemudaError | None = None
        """Why what still runs is ended."""

    async def run(self) -> int:
        fleet = Fleet(None if self._checked.launch.is_managed else self._lose_all, tracer=self._tracer)
        front_end = self._new_front(fleet)
        await front_end.start()
        self._greet(front_end)
        launcher = Launcher(self._checked.launch, CONTROL_PROCESS)
        self._on_signals(launcher)
        try:
            progress = StartProgress(self._console, self._config.replicas)
            if not await asyncio.to_thread(progress.follow, launcher.events()):
                self._console.print("stopped before it was ready")
                return 1
            await self._join(fleet, progress.ready)
            progress.summarize()
            follower = asyncio.create_task(self._follow(launcher, fleet))
            follower.add_done_callback(lambda done: self._lose("the control process ended"))
            await self._stop.wait()
            if not self._status:
                await self._drain(front_end)
        finally:
            await front_end.stop(reason=self._reason)
            await fleet.close()
            await asyncio.to_thread(launcher.wait)
        return self._status

    def _greet(self, front_end: Front) -> None:
        config, plan = self._config, self._checked.launch.replica
        copies = f", {config.replicas} replicas" if config.replicas > 1 else ""
        quantization = self._checked.model.quantization
        weights = f", weights in {quantization.name}" if quantization else ""
        device = plan.device if self._checked.launch.on_gpus is None else "what the cluster has"
        self._console.print(
            f"{plan.served_name}: {self._checked.model.architecture} in {plan.dtype}{weights} on {device}, "
            f"tp={plan.tensor_parallel_size} ep={plan.expert_parallel_size}{copies}\n"
            f"{front_end.addresses} (Ctrl-C stops)"
        )
        for notice in notices_of(self._checked):
            self._console.print(f"  notice: {notice}", markup=False)
        licence = licence_of(self._checked.directory)
        for line in (licence.describe(), *(f"  notice: {notice}" for notice in licence.notices)):
            self._console.print(line, markup=False)

    async def _drain(self, front_end: Front) -> None:
        """Until all requests have ended, the time is up, or a second signal came."""
        self._console.print("stopping: running requests may finish (once more: stop now)")
        tasks = [
            asyncio.create_task(front_end.drain(self._config.drain_timeout)),
            asyncio.create_task(self._hurry.wait()),
        ]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()

    def _on_signals(self, launcher: Launcher) -> None:
        """Before it is ready, a signal ends the start; after that, requests may finish first, until a second one."""

        def stop() -> None:
            if not self._is_ready:
                self._console.print("stopping")
                launcher.request_stop()
            elif self._stop.is_set():
                self._hurry.set()
            self._stop.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop)

    async def _join(self, fleet: Fleet, replicas: list[ReplicaReady]) -> None:
        for ready in replicas:
            await fleet.add(ready.replica, self._client(ready))
        settle_heap()
        self._is_ready = True
        for info in fleet.replicas():
            for adapter in info.adapters:
                self._console.print(
                    f"{info.id}: adapter {adapter.name}, {adapter.num_bytes} bytes on its ranks together"
                )

    def _client(self, ready: ReplicaReady) -> ReplicaClient:
        launch = self._checked.launch
        return ReplicaClient(ready.address, self._front_end_id, launch.secret, launch.replica.cluster_tls)

    async def _follow(self, launcher: Launcher, fleet: Fleet) -> None:
        """What the control process reports from now on, until its end."""
        events = launcher.events()
        while (event := await asyncio.to_thread(next, events, None)) is not None:
            if isinstance(event, Failed):
                self._console.print(f"replica {event.replica} failed: {event.message}", style="red")
                if not self._checked.launch.is_managed:
                    self._lose(event.message)
            elif isinstance(event, ReplicaReady):
                self._give_up_joining(event.replica)
                self._joining[event.replica] = asyncio.create_task(self._welcome(event, fleet))
            elif isinstance(event, Repairing | GangFormed):
                if isinstance(event, Repairing) and event.leader:
                    self._give_up_joining(event.replica)
                    await fleet.await_leader(event.replica)
                self._console.print(_describe(event), markup=False)
            elif isinstance(event, Notice):
                self._console.print(event.text, markup=False)
            elif isinstance(event, ReplicaEnded):
                self._give_up_joining(event.replica)
                await fleet.remove(event.replica)
                self._console.print(f"replica {event.replica} has ended")

    async def _welcome(self, ready: ReplicaReady, fleet: Fleet) -> None:
        """One that joins those that serve already; however long the way to it takes to be there."""
        while True:
            client, has_joined = self._client(ready), False
            try:
                await fleet.add(ready.replica, client)
                has_joined = True
            except RemudaError as error:
                self._console.print(f"replica {ready.replica} could not join yet: {error}", style="yellow")
            finally:
                if not has_joined:  # also where it is given up: the next leader may listen at the same address
                    await client.close()
            if has_joined:
                self._console.print(f"replica {ready.replica} has joined")
                return
            await asyncio.sleep(JOIN_INTERVAL_S)

    def _give_up_joining(self, replica: str) -> None:
        """It has ended, or its leader has."""
        if (task := self._joining.pop(replica, None)) is not None:
            task.cancel()

    def _lose_all(self) -> None:
        self._lose("no replica can be reached any more")

    def _lose(self, reason: str) -> None:
        """Nothing is left to serve with: stop, and say so by the exit status."""
        if not self._stop.is_set():
            self._console.print(f"remuda: {reason}; stopping", style="red")
            self._status = 1
            self._reason = Unavailable(f"the server stops: {reason}")
            self._stop.set()


def notices_of(checked: Preflight) -> list[str]:
    """What the user may want to change; the start goes on."""
    plan, notices = checked.launch.replica, []
    if plan.device == Device.CPU and not is_built():
        notices.append(
            "the package was installed without a C++ compiler, so CPU ranks compute with torch alone, more slowly; "
            "install g++ and reinstall remuda"
        )
    if plan.device == Device.CUDA and plan.spare_ranks:
        notices.append("--spare-ranks has no effect on GPUs: Ray shows none to a process that only stands by")
    if checked.model.notice:
        notices.append(checked.model.notice)
    return notices


def _describe(event: Repairing | GangFormed) -> str:
    if isinstance(event, Repairing):
        return f"replica {event.replica}: {event.message}; it forms anew, as epoch {event.epoch}"
    phases = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in event.phase_seconds.items())
    text = f"replica {event.replica} serves as epoch {event.epoch}: {phases}"
    peers, disk = event.weight_bytes.get("peers", 0), event.weight_bytes.get("disk", 0)
    if peers + disk:
        text += f"; of the new ranks' weights {peers:,} bytes came from other ranks, {disk:,} from the checkpoint"
    return text
