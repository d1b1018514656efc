"""What ``remuda serve`` shows while a model starts: the phase, a bar with an ETA while weights load, and at the end
where each rank runs and how long each phase took. On stderr; plain lines where that is not a terminal."""

import time
from collections.abc import Iterable

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from cluster.cli.errors import rebuild_error
from cluster.errors import StartFailed
from cluster.replica.events import (
    Event,
    Failed,
    Loading,
    MemoryPlanned,
    Notice,
    PhaseStarted,
    RankLoaded,
    RankPlaced,
    Repairing,
    ReplicaReady,
    Stopped,
)

PHASE_TEXT = {
    "ray": "starting Ray",
    "join": "joining Ray",
    "hosts": "waiting for the other hosts",
    "placement": "placing ranks",
    "import": "starting ranks",
    "rendezvous": "connecting ranks",
    "load": "loading weights",
    "profile": "profiling a step",
    "warm_up": "warming up",
    "adapters": "loading adapters",
    "self_test": "self-test",
}


class WhileLoading(ProgressColumn):
    """A column that is empty until the number of bytes to load is known."""

    def __init__(self, column: ProgressColumn) -> None:
        super().__init__()
        self._column = column

    def render(self, task: Task) -> RenderableType:
        return self._column.render(task) if task.total else Text("")


class StartProgress:
    """Consumes start-up events: ``follow`` shows them, ``summarize`` tells at the end what they amounted to."""

    def __init__(self, console: Console, num_replicas: int) -> None:
        self._console = console
        self._num_replicas = num_replicas
        self._started_s = time.monotonic()
        self._phase = ""
        self._phases: dict[str, float] = {}
        """Phase → when it began, in seconds since the start."""
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            WhileLoading(BarColumn()),
            WhileLoading(DownloadColumn(binary_units=True)),
            WhileLoading(TextColumn("left")),
            WhileLoading(TimeRemainingColumn()),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID = self._bar.add_task("starting", total=None)
        self._loading: dict[str, tuple[int, int]] = {}
        self.ready: list[ReplicaReady] = []
        self.ranks: list[RankPlaced] = []
        self._planned: MemoryPlanned | None = None
        self._weight_bytes: dict[tuple[str, int], int] = {}
        """(replica, rank) → what it really holds."""

    def follow(self, events: Iterable[Event]) -> bool:
        """Returns whether all replicas are ready; False when the start was stopped. Raises what made it fail."""
        with self._bar:
            for event in events:
                if isinstance(event, Stopped):
                    return False
                self._show(event)
                if len(self.ready) == self._num_replicas:
                    return True
        raise StartFailed("the control process died; what it had started has been stopped")

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
            self.ranks = [rank for rank in self.ranks if (rank.replica, rank.rank) != (event.replica, event.rank)]
            self.ranks.append(event)
        elif isinstance(event, Repairing):
            self._console.print(f"  {event.replica}: {event.message}; starting again what is lost", markup=False)
        elif isinstance(event, MemoryPlanned):
            self._planned = event
        elif isinstance(event, Notice):
            self._console.print(f"  notice: {event.text}", markup=False)
        elif isinstance(event, RankLoaded):
            self._weight_bytes[event.replica, event.rank] = event.weight_bytes
        elif isinstance(event, ReplicaReady):
            self.ready.append(event)

    def _enter(self, phase: str) -> None:
        if phase == self._phase:
            return
        self._phase = phase
        self._phases.setdefault(phase, time.monotonic() - self._started_s)
        text = PHASE_TEXT.get(phase, phase)
        self._bar.update(self._task, description=text)
        if not self._console.is_terminal:
            self._console.print(f"[{time.monotonic() - self._started_s:6.1f} s] {text}", markup=False)

    def summarize(self) -> None:
        """Print the ranks, what was planned of memory beside what it became, and the seconds of each phase."""
        for rank in sorted(self.ranks, key=lambda placed: (placed.replica, placed.rank)):
            line = f"  {rank.replica} rank {rank.rank}: {rank.device} on {rank.host}, pid {rank.pid}"
            self._console.print(line + self._weights(rank))
        for ready in self.ready:
            planned = self._planned.num_blocks if self._planned else None
            beside = "" if planned is None else f" (planned {planned:,})"
            self._console.print(f"  {ready.replica}: {ready.num_blocks:,} KV blocks{beside}")
        total_s = time.monotonic() - self._started_s
        ends = [*list(self._phases.values())[1:], total_s]
        told = ", ".join(
            f"{PHASE_TEXT.get(phase, phase)} {end - begun:.1f}"
            for (phase, begun), end in zip(self._phases.items(), ends, strict=True)
        )
        self._console.print(f"ready in {total_s:.1f} s ({told})")

    def _weights(self, rank: RankPlaced) -> str:
        held = self._weight_bytes.get((rank.replica, rank.rank))
        if held is None or self._planned is None:
            return ""
        return f", {held:,} bytes of weights (planned {self._planned.weight_bytes[rank.rank]:,})"
