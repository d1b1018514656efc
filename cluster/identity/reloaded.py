"""Files that are read again when they change, so that keys and certificates rotate without a restart."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from engine.errors import InvalidOption

_log = logging.getLogger(__name__)

T = TypeVar("T")

_Stamp = tuple[tuple[int, int, int, int] | None, ...]


class Reloaded(Generic[T]):
    """What some files say, as of the last ``poll``.

    A change that cannot be read is logged and leaves the last good value in force: a half-written file must not lock
    everybody out, and nothing is let in by it either.

    Args:
        paths: the files.
        load: reads them. Raises InvalidOption.

    Raises:
        InvalidOption: they cannot be read now.
    """

    def __init__(self, paths: Sequence[Path], load: Callable[[], T]) -> None:
        self._paths = paths
        self._load = load
        self._stamp = self._look()
        self.value = load()
        self._complaint = ""

    def poll(self) -> bool:
        """Whether there is a new value. Blocks on the file system; a bad state is tried again each time."""
        # The stamp comes first: what changes while it is read is read again the next time.
        stamp = self._look()
        if stamp == self._stamp and not self._complaint:
            return False
        self._stamp = stamp
        try:
            self.value = self._load()
        except InvalidOption as error:
            if str(error) != self._complaint:
                _log.error("kept what was read before: %s", error)
            self._complaint = str(error)
            return False
        self._complaint = ""
        _log.info("read again: %s", ", ".join(path.name for path in self._paths))
        return True

    def _look(self) -> _Stamp:
        return tuple(_stamp_of(path) for path in self._paths)


def _stamp_of(path: Path) -> tuple[int, int, int, int] | None:
    try:
        # Through symbolic links: Kubernetes swaps one to change a mounted secret.
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


def read_file(path: Path, what: str) -> bytes:
    """The content. Raises InvalidOption, which names ``what`` the file is for."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidOption(f"{what} {path} cannot be read: {error.strerror}") from error


def warn_if_readable_by_all(path: Path, what: str) -> None:
    """Secrets are the owner's, or at most a group's."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return
    if mode & 0o004:
        _log.warning("%s %s can be read by every user of this machine; chmod 600 it", what, path)
