"""Faults while a model loads: the start still succeeds, or ends with one clear error and leaves nothing behind."""

import contextlib
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from tests.chaos.cell import Row
from tests.chaos.comparison import Outcome
from tests.failover.processes import copy_model
from tests.support.served import Served, processes_with, shared_memory_files

TIMEOUT_S = 150.0
FAULTS = {
    "kill -9 a rank": ("remuda: rank", "ray::Rank"),
    "kill -9 leader": ("remuda: leader", "ray::LeaderProcess"),
    "kill -9 raylet": ("raylet/raylet",),
    "kill -9 GCS": ("gcs_server",),
    "kill -9 control process": ("remuda: control",),
    "kill -9 serve": ("bin/remuda serve",),
}
"""What the victim's command line has in it. Ray names a process after the call that it is in."""
SURVIVED = ("kill -9 a rank", "kill -9 leader")
"""The start succeeds all the same."""
_BEGINS_TO_LOAD = "connecting ranks"


def starting(directory: Path) -> Iterator[Row]:
    copy_model(directory / "model")
    for fault, titles in FAULTS.items():
        yield _start(directory, fault, titles)


def _start(directory: Path, fault: str, titles: Sequence[str]) -> Row:
    files = shared_memory_files()
    served = Served((str(directory / "model"), "--tp", "2", "--dtype", "float32"), directory / "serve.log")
    served.start()
    assert served.process is not None
    wrong = []
    try:
        victim = _wait_for(served, titles)
        struck_s = time.monotonic()
        victim.kill()
        wrong += _after(served, fault)
        pause_s = time.monotonic() - struck_s
    finally:
        if served.process.poll() is None:
            served.stop()
    if left := served.left_processes(20.0):
        wrong.append(f"left behind: {left}")
        for process in processes_with(served.mark):
            process.kill()
    if new := {name for name in shared_memory_files() - files if "remuda" in name}:
        wrong.append(f"left in shared memory: {new}")
    outcome = Outcome(0, 0, 0, 0, pause_s, ())
    became = "ready" if fault in SURVIVED else f"ended, status {served.process.returncode}"
    replaced = (fault.removeprefix("kill -9 "),) if fault in SURVIVED else ()
    return Row("tp2", fault, f"loading: {became}", outcome, replaced, tuple(wrong))


def _wait_for(served: Served, titles: Sequence[str]) -> psutil.Process:
    """The process, once ranks connect."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline_s:
        if _BEGINS_TO_LOAD in served.log.read_text():
            for process in processes_with(served.mark):
                with contextlib.suppress(psutil.Error):
                    if any(title in " ".join(process.cmdline()) for title in titles):
                        return process
        time.sleep(0.01)
    raise AssertionError(f"{titles[0]} did not appear:\n{served.log.read_text()}")


def _after(served: Served, fault: str) -> list[str]:
    """What is wrong."""
    assert served.process is not None
    if fault in SURVIVED:
        try:
            served.wait_ready()
        except AssertionError as error:
            return [f"did not become ready: {error}"]
        return []
    try:
        status = served.process.wait(TIMEOUT_S)
    except Exception as error:
        return [f"did not end: {error}"]
    if fault == "kill -9 serve":
        return [] if status == -signal.SIGKILL else [f"status {status}"]
    log = served.log.read_text()
    errors = [line for line in log.splitlines() if line.startswith("remuda: ")]
    wrong = [] if status == 1 else [f"status {status}"]
    if len(errors) != 1:
        wrong.append(f"{len(errors)} errors instead of one: {errors}")
    if "Traceback" in log:
        wrong.append("a traceback")
    return wrong
