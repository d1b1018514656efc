"""One host of a bed: a network namespace with an address of its own."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.support.hosts.namespaces import END_GRACE_S, ip

NETWORK = "10.77.0."
NETWORK6 = "fd77::"


class Host:
    """The address ``address`` on ``eth0``, its own loopback, and whatever is run in it.

    Attributes:
        setup: shell commands that every command run in the host begins with. Each has a mount namespace of its own, so
            a ``mount`` here is seen by that command and its children only; ``export`` sets their environment.
    """

    def __init__(self, name: str, number: int) -> None:
        self.name = name
        self.number = number
        self.address = f"{NETWORK}{number}"
        self.address6 = f"{NETWORK6}{number:x}"
        self.setup: list[str] = []
        self.started: list[subprocess.Popen[str]] = []

    @property
    def network(self) -> Path:
        """Its network namespace, as a file that a process can enter it by."""
        return Path("/run/netns") / self.name

    @property
    def prefix(self) -> list[str]:
        """Put before a command to run it in the host. ``ip netns exec`` becomes the command: no process in between."""
        enter = ["ip", "netns", "exec", self.name]
        if not self.setup:
            return enter
        return [*enter, "sh", "-ec", "\n".join([*self.setup, 'exec "$@"']), "sh"]

    def run(
        self, command: Sequence[str], *, timeout_s: float = 30.0, env: dict[str, str] | None = None
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command in the host to its end."""
        return subprocess.run(
            [*self.prefix, *command], capture_output=True, text=True, timeout=timeout_s, env=env, check=False
        )

    def popen(
        self,
        command: Sequence[str],
        *,
        env: dict[str, str] | None = None,
        stdin: int | None = subprocess.DEVNULL,
        stdout: int | None = subprocess.PIPE,
        stderr: int | None = subprocess.STDOUT,
    ) -> "subprocess.Popen[str]":
        """Start a command in the host. What is still running when the bed closes is ended."""
        process = subprocess.Popen(
            [*self.prefix, *command], env=env, stdin=stdin, stdout=stdout, stderr=stderr, text=True
        )
        self.started.append(process)
        return process

    def pids(self) -> list[int]:
        """Every process in the host."""
        return [int(line) for line in ip("netns", "pids", self.name).split()]

    def close(self) -> None:
        """End what ``popen`` started."""
        while self.started:
            end(self.started.pop())


def end(process: "subprocess.Popen[str]") -> None:
    """End a process that we started, collect it and close its pipes."""
    process.terminate()
    try:
        process.wait(END_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            stream.close()
