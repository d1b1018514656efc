"""The flight record on disk: a leader whose gang failed leaves what led to it where an operator finds it."""

import logging
import os
import tempfile
import threading
import time
from pathlib import Path

from engine.executor.flight_record import FlightRecord

MAX_FILES = 8
"""Of one replica; older ones go."""

_log = logging.getLogger(__name__)


def state_directory() -> Path:
    """Where this user's programs keep what outlives them (XDG base directories: ``$XDG_STATE_HOME``)."""
    base = os.environ.get("XDG_STATE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".local" / "state") / "remuda"


def write_record(record: FlightRecord, directory: Path, replica_id: str) -> Path:
    """Readable by this user alone, since it holds what people asked. Raises OSError."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    name = f"{replica_id}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{os.getpid()}.jsonl"
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".", delete=False) as file:  # of mode 0600
        for line in record.lines():
            file.write(line)
    path = directory / name
    Path(file.name).replace(path)
    for old in sorted(directory.glob(f"{replica_id}-*.jsonl"))[:-MAX_FILES]:
        old.unlink(missing_ok=True)
    return path


def leave_record(record: FlightRecord, replica_id: str) -> None:
    """In a thread of its own: nobody waits for the disk. Where it cannot be written the log says so."""

    def leave() -> None:
        try:
            _log.error("what led to the failure is in %s", write_record(record, state_directory(), replica_id))
        except OSError as error:
            _log.warning("the flight record could not be written: %s", error)

    threading.Thread(target=leave, name="flight-record", daemon=True).start()
