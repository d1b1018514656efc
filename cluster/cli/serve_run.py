"""How ``remuda serve`` runs: check, start the gangs with a progress bar, serve, and stop everything."""

import asyncio
import signal
from types import FrameType

from rich.console import Console

from cluster.cli.progress import StartProgress
from cluster.config import ServeConfig
from cluster.control.launcher import Launcher
from cluster.control.preflight import Preflight, preflight


def run(config: ServeConfig) -> int:
    """Serve until SIGINT or SIGTERM (status 0), or until no replica is left (status 1). Raises errors of our tree."""
    console = Console(stderr=True)
    checked = preflight(config)
    _greet(console, config, checked)
    launcher = Launcher(checked.launch)
    restore = _on_signals(launcher.request_stop)
    try:
        progress = StartProgress(console, config.replicas)
        if not progress.follow(launcher.events()):
            console.print("stopped before it was ready")
            return 0
        progress.summarize()
        return asyncio.run(_serve(console, config, checked, launcher, progress.ready))
    finally:
        launcher.wait()
        restore()


def _greet(console: Console, config: ServeConfig, checked: Preflight) -> None:
    plan = checked.launch.replica
    console.print(
        f"remuda: {plan.served_name} ({checked.model.architecture}, {plan.dtype}) with tp={plan.tensor_parallel_size} "
        f"ep={plan.expert_parallel_size} on {plan.device}, {config.replicas} replica(s)",
        highlight=False,
    )


def _on_signals(stop: "StopCall") -> "StopCall":
    """Call ``stop`` at SIGINT and SIGTERM; returns what restores the former handlers."""

    def handler(number: int, frame: FrameType | None) -> None:
        stop()

    former = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, previous in former.items():
            signal.signal(number, previous)

    return restore
