"""Network namespaces by name: making, listing, emptying and removing them.

A name is ``rmd-PID.STARTED-NUMBER-WHAT``: of the process that made it, when that process started (so that another one
with the same number is not taken for it), and of the bed. What beds of dead processes left is found by that.
"""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from filelock import FileLock

PREFIX = "rmd"
# Bind-mounted over /etc by ``ip netns exec``.
NETNS_ETC = Path("/etc/netns")
TUN = Path("/dev/net/tun")
SWEEPING = FileLock(Path(tempfile.gettempdir()) / "remuda-hosts.lock")
"""Held by whoever sweeps, and by tests of what is swept. A thread may take it again while it has it."""
END_GRACE_S = 2.0
_STARTED_FIELD = 19
"""Of /proc/PID/stat, counted after the command's closing parenthesis."""


def call(command: Sequence[str], given: str | None = None) -> str:
    """Run a command and return its output. Raises RuntimeError with what it said."""
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def ip(*arguments: str) -> str:
    return call(["ip", *arguments])


@cache
def why_not() -> str | None:
    """Why no bed can be made here; None where one can."""
    for tool, package in (("ip", "iproute2"), ("tc", "iproute2"), ("nft", "nftables")):
        if shutil.which(tool) is None:
            return f"needs the Debian package {package}"
    if os.geteuid() != 0:
        return "network namespaces are not permitted here: not root"
    if not TUN.exists():
        return f"needs {TUN}, for links with a delay"
    name = f"{base_name(0)}-probe"
    try:
        ip("netns", "add", name)
        try:
            ip("-n", name, "link", "add", "probe", "type", "bridge")
        finally:
            ip("netns", "del", name)
    except RuntimeError as error:
        return f"network namespaces are not permitted here: {error}"
    return None


def started(pid: int) -> str | None:
    """When a process started, in clock ticks since boot; None where there is none."""
    try:
        fields = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return fields[_STARTED_FIELD]


def base_name(number: int) -> str:
    """What the names of this process's bed ``number`` begin with."""
    return f"{PREFIX}-{os.getpid()}.{started(os.getpid())}-{number}"


def namespaces() -> list[str]:
    """Names of the network namespaces that beds of this machine have made."""
    return [line.split()[0] for line in ip("netns", "list").splitlines() if line.startswith(f"{PREFIX}-")]


def pids_in(names: Sequence[str]) -> set[int]:
    return {int(pid) for name in names for pid in _of_namespace(name, "pids").split()}


def remove_namespaces(base: str) -> None:
    """End every process in the namespaces of one bed, then remove them."""
    names = [name for name in namespaces() if name.startswith(f"{base}-")]
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + END_GRACE_S
        told: set[int] = set()
        while (pids := pids_in(names)) and time.monotonic() < deadline:
            for pid in pids - told:
                send_signal(pid, number)
            told |= pids
            time.sleep(0.02)
    for name in names:
        _of_namespace(name, "del")
        shutil.rmtree(NETNS_ETC / name, ignore_errors=True)


def _of_namespace(name: str, verb: str) -> str:
    """What ``ip netns`` says; nothing of a namespace that is gone, for somebody else may have removed it."""
    try:
        return ip("netns", verb, name)
    except RuntimeError:
        if name in namespaces():
            raise
        return ""


def send_signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def sweep() -> None:
    """Remove what beds of dead processes left, for example after SIGKILL."""
    with SWEEPING:
        for base in {"-".join(name.split("-")[:3]) for name in namespaces()}:
            pid, _, start = base.split("-")[1].partition(".")
            if started(int(pid)) != start:
                remove_namespaces(base)
