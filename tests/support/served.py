"""Runs the real ``remuda serve`` for tests, and knows how to see whether anything of it is left."""

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import psutil

REMUDA = str(Path(sys.executable).parent / "remuda")
READY_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 60.0
MARK = "REMUDA_SERVED_TEST"


def free_port() -> int:
    """A port that nobody listens at, and that nobody is given by chance while Ray starts: neither in the kernel's range
    for connections (from 32768) nor in that of Ray's workers (10002 to 19999)."""
    while True:
        port = 20000 + secrets.randbelow(12000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def run_remuda(*arguments: str, timeout_s: float = 90.0, **variables: str) -> subprocess.CompletedProcess[str]:
    """One ``remuda`` command to its end."""
    environment = {**os.environ, **variables}
    return subprocess.run(
        [REMUDA, *arguments], capture_output=True, text=True, timeout=timeout_s, env=environment, check=False
    )


def processes_with(mark: str) -> list[psutil.Process]:
    """Every live process that inherited ``mark`` in its environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def leader_of(processes: list[psutil.Process]) -> psutil.Process:
    """The one leader among them. Ray names a process after the call that it is in: of a leader, nearly always one."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            command = " ".join(process.cmdline()[:1])
            if any(title in command for title in ("remuda: leader", "ray::LeaderProcess")):
                found.append(process)
    (leader,) = found
    return leader


def listening_addresses(mark: str) -> set[tuple[str, str]]:
    """(program, address) of every socket that takes connections or datagrams from anyone."""
    return {
        (process.name(), connection.laddr.ip.removeprefix("::ffff:"))
        for process in processes_with(mark)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN or (connection.type == socket.SOCK_DGRAM and not connection.raddr)
    }


@dataclass
class Served:
    """A ``remuda serve`` process with ports of its own. A context manager: ready at entry, stopped at exit."""

    arguments: tuple[str, ...]
    log: Path
    temporary: Path = Path("/tmp")
    """TMPDIR of the server. Short: Ray's socket paths start with it."""
    command: str = "serve"

    def __post_init__(self) -> None:
        self.port, self.grpc_port = free_port(), free_port()
        self.mark = uuid.uuid4().hex
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    def start(self) -> None:
        """Start without waiting."""
        command = [REMUDA, self.command, *self.arguments]
        command += ["--port", str(self.port), "--grpc-port", str(self.grpc_port)]
        environment = {**os.environ, MARK: self.mark, "TMPDIR": str(self.temporary), "PYTHONFAULTHANDLER": "1"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)

    def wait_ready(self) -> None:
        assert self.process is not None
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline_s:
            assert self.process.poll() is None, (
                f"{self.command} ended with {self.process.returncode}:\n{self.log.read_text()}"
            )
            try:
                if httpx.get(f"{self.url}/readyz", timeout=2).status_code == httpx.codes.OK:
                    return
            except httpx.TransportError:
                pass  # Not listening yet.
            time.sleep(0.1)
        raise AssertionError(f"not ready within {READY_TIMEOUT_S} s:\n{self.log.read_text()}")

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and return the exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(STOP_TIMEOUT_S)

    def status(self) -> dict[str, Any]:
        """``remuda status --json``."""
        result = run_remuda("status", "--json", "--target", self.target)
        assert result.returncode == 0, result.stderr
        answer: dict[str, Any] = json.loads(result.stdout)
        return answer

    def left_processes(self, timeout_s: float = 10.0) -> list[str]:
        """Processes of this server that still live after ``timeout_s``."""
        _, alive = psutil.wait_procs(processes_with(self.mark), timeout=timeout_s)
        return [f"{process.pid} {' '.join(process.cmdline())[:150]}" for process in alive]

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process is not None and self.process.poll() is None:
            self.stop()

    def _kill(self) -> None:
        for process in processes_with(self.mark):
            process.kill()


class Secured(Served):
    """One that is asked for its health at a plain port of its own."""

    probes_port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.probes_port}"
