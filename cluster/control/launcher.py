"""Starts the control process and follows it. The process that serves clients imports no Ray: it outlives Ray's control
plane, which the control process, a Ray driver, does not."""

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import IO

from cluster.replica.events import Event, LaunchConfig, Stopped, decode_event, encode_config

STOP_TIMEOUT_S = 45.0
"""Longest time that the control process may take to stop everything that it started."""


class Launcher:
    """The control process of one ``remuda serve``. It stops everything when its standard input closes, and so also
    when this process dies in any way. ``module``: the program to run, which calls ``cluster.control.launch.main``."""

    def __init__(self, config: LaunchConfig, module: str) -> None:
        read_fd, write_fd = os.pipe()
        self._events: IO[bytes] = os.fdopen(read_fd, "rb")
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, str(write_fd)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[write_fd],
            start_new_session=True,
        )
        os.close(write_fd)
        assert self._process.stdin is not None
        self._stdin: IO[bytes] = self._process.stdin
        self._stdin.write(encode_config(config))
        self._stdin.flush()

    def events(self) -> Iterator[Event]:
        """Blocks for the next event; ends when everything has been stopped, or the control process has died."""
        for line in self._events:
            event = decode_event(line)
            yield event
            if isinstance(event, Stopped):
                return

    def request_stop(self) -> None:
        """Ask for the end; ``events`` then ends with Stopped. Can be called from a signal handler, and twice."""
        if not self._stdin.closed:
            self._stdin.close()

    def wait(self) -> int:
        """Wait for the control process to be gone, by force after STOP_TIMEOUT_S. Returns its exit status."""
        self.request_stop()
        try:
            return self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()
        finally:
            self._events.close()
