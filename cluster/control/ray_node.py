"""Start one Ray node of our own and stop exactly what was started. No Ray import: the node is other processes."""

import json
import os
import secrets
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import cluster
from cluster.control.ray_guardian import START_TIMEOUT_S
from cluster.control.ray_settings import (
    MAX_ROOT_BYTES,
    NodePaths,
    NodeSpec,
    node_environment,
    start_command,
)
from cluster.errors import StartFailed

STOP_TIMEOUT_S = 30.0
SHORT_TEMPORARY_DIRECTORY = "/tmp"


class RayNode:
    """A Ray node that this process started, under a guardian that outlives neither it nor this process.

    Use as a context manager or call ``close``. Should this process die in any way, the guardian sees its end of a
    pipe close and stops the node.

    Attributes:
        address: host:port of the cluster that the node belongs to.
        token_file: the cluster's authentication token (mode 0600).
        paths: where the node keeps its files; gone after ``close``.
        start_s: how long the start took, in seconds.
    """

    def __init__(self, guardian: "subprocess.Popen[bytes]", paths: NodePaths, token_file: Path) -> None:
        self._guardian: subprocess.Popen[bytes] | None = guardian
        self.paths = paths
        self.token_file = token_file
        self.address = ""
        self.start_s = 0.0

    @classmethod
    def start(cls, spec: NodeSpec, *, token_file: Path | None = None, command_prefix: Sequence[str] = ()) -> "RayNode":
        """Start a node and wait until it is up.

        Args:
            token_file: the token of the cluster to join; a head makes its own where none is given.
            command_prefix: put before the guardian's command, for example ``ip netns exec NAME``.

        Raises:
            StartFailed: Ray did not start; the message holds the reason that Ray printed.
        """
        started_s = time.monotonic()
        paths = make_directory()
        if token_file is None:
            if spec.head_address is not None:
                raise ValueError("a node that joins a cluster needs the cluster's token file")
            token_file = paths.token
            write_private(token_file, secrets.token_hex(32))
        package_root = Path(cluster.__path__[0]).parent
        environment = node_environment(os.environ, spec, paths, token_file, package_root)
        command = [*command_prefix, sys.executable, "-m", "cluster.control.ray_guardian", str(paths.root)]
        guardian = subprocess.Popen(
            [*command, *start_command(spec, paths)],
            env=environment, cwd=paths.root, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        node = cls(guardian, paths, token_file)
        try:
            answer = node._read(START_TIMEOUT_S + STOP_TIMEOUT_S)
            if "address" not in answer:
                raise StartFailed(f"Ray did not start: {answer.get('error', 'its guardian ended without a word')}")
        except BaseException:
            node.close()
            raise
        node.address = str(answer["address"])
        node.start_s = time.monotonic() - started_s
        return node

    @property
    def pid(self) -> int | None:
        """The guardian's process id; every process of the node descends from it. None once closed."""
        return None if self._guardian is None else self._guardian.pid

    def close(self) -> list[str]:
        """Stop the node and remove its files. May be called twice.

        Returns:
            the names of processes that did not heed SIGTERM and were killed.
        """
        guardian, self._guardian = self._guardian, None
        if guardian is None:
            return []
        assert guardian.stdin is not None and guardian.stdout is not None
        guardian.stdin.close()
        try:
            guardian.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            guardian.kill()
            guardian.wait()
            raise StartFailed(
                f"Ray's guardian {guardian.pid} did not stop its node within {STOP_TIMEOUT_S:.0f} s and was killed; "
                f"look for processes that use {self.paths.root}"
            ) from None
        finally:
            last_words = guardian.stdout.read()
            guardian.stdout.close()
            shutil.rmtree(self.paths.root, ignore_errors=True)
        return killed_processes(last_words)

    def _read(self, timeout_s: float) -> dict[str, Any]:
        """One line of the guardian, as JSON; empty where it ended or said nothing in time."""
        assert self._guardian is not None and self._guardian.stdout is not None
        return read_message(self._guardian.stdout, timeout_s)

    def __enter__(self) -> "RayNode":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_message(stream: IO[bytes], timeout_s: float) -> dict[str, Any]:
    readable, _, _ = select.select([stream], [], [], timeout_s)
    line = stream.readline() if readable else b""
    message: dict[str, Any] = json.loads(line) if line else {}
    return message


def killed_processes(last_words: bytes) -> list[str]:
    """What the guardian's last line says it had to kill."""
    lines = last_words.splitlines()
    return list(json.loads(lines[-1]).get("killed", [])) if lines else []


def make_directory() -> NodePaths:
    """A new private directory, under a path short enough for Ray's sockets."""
    parent = tempfile.gettempdir()
    if len(parent.encode()) + len("/remuda-") + 8 > MAX_ROOT_BYTES:
        parent = SHORT_TEMPORARY_DIRECTORY
    return NodePaths(Path(tempfile.mkdtemp(prefix="remuda-", dir=parent)))


def write_private(path: Path, text: str) -> None:
    """Write a new file that only its owner may read."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
