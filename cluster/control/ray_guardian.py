"""The process that starts one Ray node and answers for its end. Run as ``python -m cluster.control.ray_guardian``.

Ray's processes outlive ``ray start``, change their session, and start others. The guardian is their *subreaper*
(``prctl(2)``): whatever they leave behind becomes its child, so it knows exactly what was started and never has to
search by name. It stops all of it when its standard input closes, which the kernel sees to even if the process
that holds the other end is killed. Torch-free and Ray-free.

Standard output carries one JSON object a line: ``{"address": …}`` or ``{"error": …}`` once, later ``{"stopped": …}``.
"""

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import setproctitle

from cluster.control.ray_settings import NodePaths

PR_SET_CHILD_SUBREAPER = 36
START_TIMEOUT_S = 90.0
RAYLET_GRACE_S = 5.0
OTHERS_GRACE_S = 5.0
KILL_GRACE_S = 10.0
POLL_S = 0.02
LOG_TAIL_BYTES = 2000


class EndOfDuty:
    """Knows when to stop: standard input has ended, or SIGTERM came. And when a child has ended."""

    def __init__(self) -> None:
        self._signalled, self._wake = os.pipe()
        signal.signal(signal.SIGTERM, lambda number, frame: os.write(self._wake, b"."))
        self._child_ended, self._child_wake = os.pipe()
        os.set_blocking(self._child_wake, False)
        signal.signal(signal.SIGCHLD, lambda number, frame: self._note_child())
        # The terminal's Ctrl-C is for our parent, which then tells us in its own time.
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def _note_child(self) -> None:
        with contextlib.suppress(BlockingIOError):  # so many have ended that one more makes no difference
            os.write(self._child_wake, b".")

    def wait(self, timeout_s: float) -> bool:
        """Wait for the end. Returns whether it has come; False after ``timeout_s`` seconds."""
        readable, _, _ = select.select([sys.stdin, self._signalled], [], [], timeout_s)
        return self._is_among(readable)

    def wait_for_child(self) -> bool:
        """Wait for the end, or until a child has ended since the last call. Returns whether the end has come."""
        readable, _, _ = select.select([sys.stdin, self._signalled, self._child_ended], [], [])
        if self._child_ended in readable:
            os.read(self._child_ended, 4096)
        return self._is_among(readable)

    def _is_among(self, readable: list[object]) -> bool:
        return self._signalled in readable or (sys.stdin in readable and os.read(sys.stdin.fileno(), 4096) == b"")


def become_subreaper() -> None:
    """Make every orphaned descendant a child of this process.

    Raises:
        OSError: the kernel refused.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


def say(message: dict[str, object]) -> None:
    """Tell the parent, if it still listens."""
    try:
        print(json.dumps(message), flush=True)
    except BrokenPipeError:
        # The parent is gone; the end of our input will say so too. Nobody is left to tell.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def descendants() -> list[psutil.Process]:
    """Every living process that we or our descendants started."""
    alive = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
        except psutil.NoSuchProcess:
            continue
    return alive


def named(names: frozenset[str]) -> list[psutil.Process]:
    """Those of our descendants that have one of these names."""
    return [process for process in descendants() if process_name(process) in names]


def reap() -> None:
    """Collect orphans that have ended, so that they do not stay as zombies."""
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return


def signal_all(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def wait_gone(names: frozenset[str] | None, grace_s: float) -> bool:
    """Wait until no descendant (of these names; None: at all) is alive. Returns whether that came true in time."""
    deadline = time.monotonic() + grace_s
    while True:
        reap()
        left = descendants()
        if not any(names is None or process_name(process) in names for process in left):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)


def process_name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


def stop_all() -> list[str]:
    """End every descendant: raylets first (they end their workers), then the rest, then by force.

    The control service is always ended by force. Told to stop, it now and then waits for ever (Ray 2.60; one end in
    five on a busy host) to send its last events to an agent that ended with the raylet. It keeps nothing that matters.

    Returns:
        the names of the others that had to be killed.
    """
    raylets = frozenset({"raylet"})
    signal_all(named(raylets), signal.SIGTERM)
    wait_gone(raylets, RAYLET_GRACE_S)
    signal_all(named(frozenset({"gcs_server"})), signal.SIGKILL)
    signal_all(descendants(), signal.SIGTERM)
    if wait_gone(None, OTHERS_GRACE_S):
        return []
    killed = []
    deadline = time.monotonic() + KILL_GRACE_S
    # A dying process may just have started another: kill until nobody is left.
    while (left := descendants()) and time.monotonic() < deadline:
        killed += [process_name(process) for process in left]
        signal_all(left, signal.SIGKILL)
        wait_gone(None, 0.5)
    return killed


def start_node(command: list[str], paths: NodePaths, end: EndOfDuty) -> str | None:
    """Run ``ray start`` and return the cluster's address, host:port; None where the end came first.

    Raises:
        RuntimeError: Ray did not start; the message holds the end of what it printed.
    """
    with paths.log.open("wb") as log:
        starter = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=paths.root)
    deadline = time.monotonic() + START_TIMEOUT_S
    while starter.poll() is None:
        if time.monotonic() > deadline:
            raise RuntimeError(f"ray start took longer than {START_TIMEOUT_S:.0f} s: {log_tail(paths.log)}")
        if end.wait(POLL_S):
            return None
    if starter.returncode != 0:
        raise RuntimeError(f"ray start ended with {starter.returncode}: {log_tail(paths.log)}")
    return paths.address.read_text().strip()


def log_tail(log: Path) -> str:
    text = log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace").strip()
    return " | ".join(line.strip() for line in text.splitlines() if line.strip())


def main(arguments: list[str]) -> int:
    """``ray_guardian ROOT COMMAND…``: start, stay until told, stop, remove ROOT. Returns 1 where Ray did not start."""
    paths = NodePaths(Path(arguments[0]))
    setproctitle.setproctitle("remuda: ray guardian")
    become_subreaper()
    end = EndOfDuty()
    status = 0
    try:
        address = start_node(arguments[1:], paths, end)
        if address is not None:
            say({"address": address})
            while not end.wait_for_child():
                reap()
    except (RuntimeError, OSError) as error:
        status = 1
        say({"error": str(error)})
    finally:
        started_s = time.monotonic()
        killed = stop_all()
        shutil.rmtree(paths.root, ignore_errors=True)
        say({"stopped": True, "seconds": round(time.monotonic() - started_s, 3), "killed": killed})
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
