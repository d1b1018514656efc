"""Files of shared memory that are left behind, told apart from those that others use at the same time."""

import os
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")


def shared_memory_files() -> set[str]:
    return set(os.listdir(SHARED_MEMORY))


def left_since(before: set[str]) -> set[str]:
    """The files that are new since ``before`` and that no process has mapped: whoever made them is gone.

    Tests run beside each other, and a file that is mapped belongs to something that lives. That nothing of a test's own
    lives on is asserted apart.
    """
    new = shared_memory_files() - before
    return (new - _mapped(new)) & shared_memory_files() if new else new


def _mapped(names: set[str]) -> set[str]:
    found: set[str] = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            maps = (process / "maps").read_text(errors="replace")
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            continue
        found |= {name for name in names if f"{SHARED_MEMORY}/{name}" in maps}
    return found
