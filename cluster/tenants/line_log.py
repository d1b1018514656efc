"""One JSON line after another to a file that something else may rotate."""

import logging
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from engine.errors import InvalidOption

MAX_WAITING_LINES = 65_536

_log = logging.getLogger(__name__)


class LineLog:
    """Each line is one ``write`` to the end of the file, by a thread of its own, so that a slow disk holds up nobody.

    A file that was renamed or removed is opened anew before the next line. Lines that cannot be written, or for which
    there is no room while the disk stands still, are lost, counted and said in the server's log.

    Args:
        path: the file; others may append to it as well.
        lost: called for each lost line.

    Raises:
        InvalidOption: it cannot be opened now.
    """

    def __init__(self, path: Path, lost: Callable[[], None]) -> None:
        self._path = path
        self._lost = lost
        self._lines: queue.Queue[bytes | None] = queue.Queue(MAX_WAITING_LINES)
        self._is_failing = False
        try:
            self._file = _open(path)
        except OSError as error:
            raise InvalidOption(f"{path} cannot be written: {error.strerror}") from error
        self._writer = threading.Thread(target=self._run, name="remuda-line-log", daemon=True)
        self._writer.start()

    def write(self, record: Any) -> None:
        """Returns at once."""
        try:
            self._lines.put_nowait(msgspec.json.encode(record) + b"\n")
        except queue.Full:
            self._lost()

    def close(self) -> None:
        """When all lines are written."""
        self._lines.put(None)
        self._writer.join()
        os.close(self._file)

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._append(line)
            except OSError as error:
                self._lost()
                if not self._is_failing:
                    _log.error("%s cannot be written, lines are lost: %s", self._path, error.strerror)
                self._is_failing = True
            else:
                self._is_failing = False

    def _append(self, line: bytes) -> None:
        if not self._is_current():
            opened = _open(self._path)
            os.close(self._file)
            self._file = opened
        while line:
            line = line[os.write(self._file, line) :]

    def _is_current(self) -> bool:
        try:
            there = self._path.stat()
        except FileNotFoundError:
            return False
        mine = os.fstat(self._file)
        return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)


def _open(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
