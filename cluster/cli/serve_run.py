"""How ``remuda serve`` runs: check, start the gangs with a progress bar, serve, and stop everything."""

import asyncio
import signal
import threading
import uuid
from collections.abc import Callable
from types import FrameType

import uvloop
from rich.console import Console

from cluster.cli.progress import StartProgress
from cluster.config import ServeConfig
from cluster.control.launcher import Launcher
from cluster.control.preflight import Preflight, preflight
from cluster.frontend.app import FrontEnd, FrontEndConfig
from cluster.frontend.calls import TimeLimits
from cluster.frontend.fleet import Fleet
from cluster.frontend.model_files import read_model_files
from cluster.frontend.tokenizer import Tokenizer
from cluster.replica.client import ReplicaClient
from cluster.replica.events import Failed, ReplicaReady

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run(config: ServeConfig) -> int:
    """Serve until SIGINT or SIGTERM (status 0), or until no replica is left (status 1). Raises errors of our tree."""
    console = Console(stderr=True, soft_wrap=True)
    checked = preflight(config)
    Tokenizer(read_model_files(checked.directory))  # raises CheckpointError where the front end could not use it
    _greet(console, config, checked)
    launcher = Launcher(checked.launch)
    restore = _on_signals(launcher.request_stop)
    try:
        progress = StartProgress(console, config.replicas)
        if not progress.follow(launcher.events()):
            console.print("stopped before it was ready")
            return 0
        progress.summarize()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_Serving(console, config, checked, launcher).run(progress.ready))
    finally:
        launcher.wait()
        restore()


def _greet(console: Console, config: ServeConfig, checked: Preflight) -> None:
    plan = checked.launch.replica
    copies = f", {config.replicas} replicas" if config.replicas > 1 else ""
    console.print(
        f"{plan.served_name}: {checked.model.architecture} in {plan.dtype} on {plan.device}, "
        f"tp={plan.tensor_parallel_size} ep={plan.expert_parallel_size}{copies}",
        highlight=False,
    )


def _on_signals(stop: Callable[[], None]) -> Callable[[], None]:
    """Call ``stop`` at SIGINT and SIGTERM; returns what restores the former handlers."""

    def handler(number: int, frame: FrameType | None) -> None:
        stop()

    former = {number: signal.signal(number, handler) for number in _SIGNALS}

    def restore() -> None:
        for number, previous in former.items():
            signal.signal(number, previous)

    return restore


class _Serving:
    """The time between ready and stopped."""

    def __init__(self, console: Console, config: ServeConfig, checked: Preflight, launcher: Launcher) -> None:
        self._console = console
        self._config = config
        self._checked = checked
        self._launcher = launcher
        self._stop = asyncio.Event()
        self._status = 0

    async def run(self, replicas: list[ReplicaReady]) -> int:
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._stop.set)
        front_end_id = f"front-end-{uuid.uuid4().hex[:12]}"
        secret = self._checked.launch.secret
        clients = {ready.replica: ReplicaClient(ready.address, front_end_id, secret) for ready in replicas}
        fleet = Fleet(clients, on_all_lost=lambda: self._lose("no replica can be reached any more"))
        front_end = FrontEnd(self._front_end_config(), fleet)
        threading.Thread(target=self._follow, args=(loop,), name="control-events", daemon=True).start()
        await fleet.start()
        await front_end.start()
        host = self._config.host
        self._console.print(
            f"HTTP http://{host}:{front_end.port}/v1   gRPC {host}:{front_end.grpc_port}   Ctrl-C stops",
            highlight=False,
        )
        await self._stop.wait()
        self._console.print("stopping: running requests may finish", highlight=False)
        await front_end.stop(self._config.drain_timeout)
        await fleet.close()
        return self._status

    def _front_end_config(self) -> FrontEndConfig:
        config = self._config
        return FrontEndConfig(
            name=config.name,
            model_path=self._checked.directory,
            host=config.host,
            port=config.port,
            grpc_port=config.grpc_port,
            api_key_file=config.api_key_file,
            limits=TimeLimits(config.request_timeout, config.queue_timeout, config.first_token_timeout),
        )

    def _follow(self, loop: asyncio.AbstractEventLoop) -> None:
        """In a thread: what the control process reports from now on, and its end."""
        for event in self._launcher.events():
            if isinstance(event, Failed):
                self._console.print(f"replica {event.replica} failed: {event.message}", highlight=False, style="red")
        if not self._stop.is_set():
            loop.call_soon_threadsafe(self._lose, "the control process ended")

    def _lose(self, reason: str) -> None:
        """Nothing is left to serve with: stop, and say so by the exit status."""
        if not self._stop.is_set():
            self._console.print(f"remuda: {reason}; stopping", highlight=False, style="red")
            self._status = 1
            self._stop.set()
