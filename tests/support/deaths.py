"""Which process of a server died of a signal, which signal, and the stack that it left."""

import contextlib
import fcntl
import os
import re
import signal
import struct
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

_FATAL = re.compile(r"Fatal Python error|\*\*\* SIG[A-Z]+ received|\*\*\* Aborted|terminate called")
"""What Python, Ray's processes and C++ say first when they die."""
_STACK_LINES = 80
_SESSION = re.compile(r"/[^\s,:=]+/session_[0-9_-]+")
_INFO_BYTES = 64
_GET_INFO = 3 << 30 | _INFO_BYTES << 16 | 0xFF << 8 | 11
"""ioctl(2) PIDFD_GET_INFO."""
_INFO_EXIT = 1 << 3


class Watched:
    """Holds on to processes, to know afterwards how they ended. A context manager: at exit it raises AssertionError
    where a signal ended one, instead of whatever else went wrong because of that.

    Args:
        processes: to watch.
        logs: where they write, beside the logs of their Ray session, which are found by their commands.
    """

    def __init__(self, processes: Iterable[psutil.Process], logs: Iterable[Path]) -> None:
        self._logs = list(logs)
        self._names: dict[int, str] = {}
        """By pidfd."""
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                command = " ".join(process.cmdline())
                self._logs += (Path(found) / "logs" for found in sorted(set(_SESSION.findall(command))))
                self._names[os.pidfd_open(process.pid)] = f"process {process.pid} ({command[:160].strip()})"
        self._began = {file: file.stat().st_size for file in self._files()}

    def deaths(self) -> list[str]:
        """One per process that a signal ended; and what was written of one."""
        found = []
        for pidfd, name in self._names.items():
            status = _exit_status(pidfd)
            if status is not None and os.WIFSIGNALED(status):
                found.append(f"{name} died of {signal.Signals(os.WTERMSIG(status)).name}")
        return found + self._stacks()

    def _files(self) -> set[Path]:
        return {
            file
            for log in self._logs
            for file in (log.rglob("*") if log.is_dir() else [log])
            if file.is_file() and not file.is_symlink()
        }

    def _stacks(self) -> list[str]:
        found = []
        for file in sorted(self._files()):
            with file.open(errors="replace") as log:
                log.seek(self._began.get(file, 0))
                lines = log.read().splitlines()
            first = next((index for index, line in enumerate(lines) if _FATAL.search(line)), None)
            if first is not None:
                found.append(f"{file} has:\n" + "\n".join(lines[first : first + _STACK_LINES]))
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        found = self.deaths()
        for pidfd in self._names:
            os.close(pidfd)
        if found:
            raise AssertionError("\n".join(found)) from error


def _exit_status(pidfd: int) -> int | None:
    """As wait(2) has it, of a process that need not be our child. None: it lives, its parent has not asked yet, or the
    kernel is older than 6.15 and does not tell."""
    request = bytearray(struct.pack("<Q", _INFO_EXIT).ljust(_INFO_BYTES, b"\0"))
    try:
        fcntl.ioctl(pidfd, _GET_INFO, request)
    except OSError:
        return None
    (mask,) = struct.unpack_from("<Q", request)
    (status,) = struct.unpack_from("<i", request, _INFO_BYTES - 4)
    return int(status) if mask & _INFO_EXIT else None
