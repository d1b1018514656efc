"""Faults while a model loads: the start still succeeds, or ends with one clear error and leaves nothing behind."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.chaos.cell import Choice, Row
from tests.chaos.comparison import Outcome, ask_once
from tests.chaos.site import NotSettled, OneHost, gang_of, replaced_since, settle
from tests.failover.processes import copy_model
from tests.support.served import Served, processes_with
from tests.support.shared_memory import left_since, shared_memory_files

TIMEOUT_S = 150.0


@dataclass(frozen=True)
class StartFault:
    """``strike``: called when the start has come to ``phase``; returns its victim, if that is one process.
    ``replaced``: what the victim is, where it is to be another one afterwards; all others are to be the same. Where the
    start does not survive, ``status`` is what the server ends with."""

    name: str
    strike: Callable[[Served], psutil.Process | None]
    survives: bool = False
    replaced: str | None = None
    status: int = 1
    phase: str = "connecting ranks"


def on(number: signal.Signals, *titles: str) -> Callable[[Served], psutil.Process]:
    """A signal to the process whose command line has one of these in it. Ray names a process after the call that it is
    in."""

    def strike(served: Served) -> psutil.Process:
        victim = _wait_for(served, titles)
        victim.send_signal(number)
        return victim

    return strike


_RANK = ("remuda: rank", "ray::Rank")
FAULTS = (
    StartFault("kill -9 a rank", on(signal.SIGKILL, *_RANK), survives=True, replaced="a rank"),
    StartFault("SIGSTOP a rank", on(signal.SIGSTOP, *_RANK), survives=True, replaced="a rank"),
    StartFault(
        "SIGSTOP a rank as its life begins",
        on(signal.SIGSTOP, "ray::Rank.run"),
        survives=True,
        replaced="a rank",
        phase="placing ranks",
    ),
    StartFault(
        "kill -9 leader", on(signal.SIGKILL, "remuda: leader", "ray::LeaderProcess"), survives=True, replaced="leader"
    ),
    StartFault("kill -9 raylet", on(signal.SIGKILL, "raylet/raylet")),
    StartFault("kill -9 GCS", on(signal.SIGKILL, "gcs_server"), survives=True),
    StartFault("kill -9 control process", on(signal.SIGKILL, "remuda: control")),
    StartFault("kill -9 serve", on(signal.SIGKILL, "bin/remuda serve"), status=-signal.SIGKILL),
)


def starting(directory: Path, choice: Choice) -> Iterator[Row]:
    copy_model(directory / "model")
    for fault in choice.of(FAULTS):
        yield struck_at_start(directory, fault)


def struck_at_start(directory: Path, fault: StartFault, temporary: Path = Path("/tmp")) -> Row:
    """``directory`` has the model. ``temporary``: the server's TMPDIR."""
    files = shared_memory_files()
    arguments = (str(directory / "model"), "--served-model-name", "m", "--tp", "2", "--dtype", "float32")
    served = Served(arguments, directory / "serve.log", temporary)
    served.start()
    assert served.process is not None
    wrong: list[str] = []
    replaced: tuple[str, ...] = ()
    try:
        _wait_until(served, fault.phase)
        before = gang_of(processes_with(served.mark))
        struck_s = time.monotonic()
        victim = fault.strike(served)
        if victim is not None and fault.replaced is not None:
            before[victim.pid] = fault.replaced
        wrong += _end_of_start(served, fault)
        outcome = Outcome(0, 0, 0, 0, time.monotonic() - struck_s, ())
        if fault.survives and not wrong:
            outcome, replaced, more = _started(served, fault, before, outcome.gap_s)
            wrong += more
    finally:
        if served.process.poll() is None:
            served.stop()
    if left := served.left_processes(20.0):
        wrong.append(f"left behind: {left}")
        for process in processes_with(served.mark):
            process.kill()
    if new := {name for name in left_since(files) if "remuda" in name}:
        wrong.append(f"left in shared memory: {new}")
    became = "ready" if fault.survives else f"ended, status {served.process.returncode}"
    return Row("tp2", fault.name, f"loading: {became}", outcome, replaced, tuple(wrong))


def _started(
    served: Served, fault: StartFault, before: dict[int, str], pause_s: float
) -> tuple[Outcome, tuple[str, ...], list[str]]:
    """Whether it serves, who was replaced, and what is wrong with that. ``before``: the gang's processes when it
    struck."""
    outcome = ask_once([served.url], None, pause_s)
    try:
        replaced = replaced_since(before, settle(OneHost(served)))
    except NotSettled as error:
        return outcome, (), [*outcome.notes, str(error)]
    due = () if fault.replaced is None else (fault.replaced,)
    wrong = (
        [] if replaced == due else [f"replaced: {', '.join(replaced) or 'nobody'}, not {', '.join(due) or 'nobody'}"]
    )
    return outcome, replaced, [*outcome.notes, *wrong]


def _wait_until(served: Served, phase: str) -> None:
    """Or until it has ended."""
    assert served.process is not None
    deadline_s = time.monotonic() + TIMEOUT_S
    while phase not in served.log.read_text() and served.process.poll() is None:
        assert time.monotonic() < deadline_s, served.log.read_text()
        time.sleep(0.01)


def _wait_for(served: Served, titles: Sequence[str]) -> psutil.Process:
    deadline_s = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline_s:
        for process in processes_with(served.mark):
            with contextlib.suppress(psutil.Error):
                if any(title in " ".join(process.cmdline()) for title in titles):
                    return process
        time.sleep(0.01)
    raise AssertionError(f"{titles[0]} did not appear:\n{served.log.read_text()}")


def _end_of_start(served: Served, fault: StartFault) -> list[str]:
    """What is wrong."""
    assert served.process is not None
    if fault.survives:
        try:
            served.wait_ready()
        except AssertionError as error:
            return [f"did not become ready: {error}"]
        return []
    try:
        status = served.process.wait(TIMEOUT_S)
    except Exception as error:
        return [f"did not end: {error}"]
    wrong = [] if status == fault.status else [f"status {status}"]
    if status < 0:
        return wrong
    log = served.log.read_text()
    errors = [line for line in log.splitlines() if line.startswith("remuda: ")]
    if len(errors) != 1:
        wrong.append(f"{len(errors)} errors instead of one: {errors}")
    if "Traceback" in log:
        wrong.append("a traceback")
    return wrong
