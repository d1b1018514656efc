"""What ``remuda serve`` shows while a model starts: the phase, a bar with an ETA while weights load, and at the end
where each rank runs and how long each phase took. On stderr; plain lines where that is not a terminal."""

import time
from collections.abc import Iterable

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from cluster.cli.errors import rebuild_error
from cluster.replica.events import Event, Failed, Loading, PhaseStarted, RankPlaced, ReplicaReady

PHASE_TEXT = {
    "ray": "starting Ray",
    "placement": "placing ranks",
    "import": "starting ranks",
    "rendezvous": "connecting ranks",
    "load": "loading weights",
    "profile": "profiling a step",
    "warm_up": "warming up",
}


class StartProgress:
    """Consumes start-up events. Use as a context manager around ``follow``."""

    def __init__(self, console: Console, num_replicas: int) -> None:
        self._console = console
        self._num_replicas = num_replicas
        self._started_s = time.monotonic()
        self._phase = ""
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TextColumn("elapsed"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID = self._bar.add_task("starting", total=None)
        self._loading: dict[str, tuple[int, int]] = {}
        self.ready: list[ReplicaReady] = []
        self.ranks: list[RankPlaced] = []

    def follow(self, events: Iterable[Event]) -> bool:
        """Returns whether all replicas are ready; False when the start was stopped. Raises what made it fail."""
        with self._bar:
            for event in events:
                self._show(event)
                if len(self.ready) == self._num_replicas:
                    return True
        return False

    def _show(self, event: Event) -> None:
        if isinstance(event, Failed):
            raise rebuild_error(event.kind, event.message)
        if isinstance(event, PhaseStarted):
            self._enter(event.phase)
        elif isinstance(event, Loading):
            self._loading[event.replica] = (event.num_bytes_done, event.num_bytes_total)
            done, total = (sum(column) for column in zip(*self._loading.values(), strict=True))
            self._bar.update(self._task, completed=done, total=total or None)
        elif isinstance(event, RankPlaced):
            self.ranks.append(event)
        elif isinstance(event, ReplicaReady):
            self.ready.append(event)

    def _enter(self, phase: str) -> None:
        if phase == self._phase:
            return
        self._phase = phase
        text = PHASE_TEXT.get(phase, phase)
        self._bar.update(self._task, description=text)
        if not self._console.is_terminal:
            self._console.print(f"[{time.monotonic() - self._started_s:6.1f} s] {text}", markup=False)

    def summarize(self) -> None:
        """Print the ranks, and the seconds of each phase as the slowest replica saw it."""
        for rank in sorted(self.ranks, key=lambda placed: (placed.replica, placed.rank)):
            line = f"  {rank.replica} rank {rank.rank}: {rank.device} on {rank.host}, pid {rank.pid}"
            self._console.print(line, highlight=False)
        phases: dict[str, float] = {}
        for replica in self.ready:
            for phase, seconds in replica.phase_seconds.items():
                phases[phase] = max(phases.get(phase, 0.0), seconds)
        told = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in phases.items())
        total_s = time.monotonic() - self._started_s
        self._console.print(f"ready in {total_s:.1f} s ({told})", highlight=False)
