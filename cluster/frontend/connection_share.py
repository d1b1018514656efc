"""How many connections each server of one process may hold: what strangers open must leave files for the others."""

import resource

_MOST_FILES = 20_000
"""More are not used, however many the process may have open."""


def affordable_connections(share: float) -> int:
    """``share`` of the files that this process may have open, at least one."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(1, int(share * (_MOST_FILES if soft == resource.RLIM_INFINITY else min(soft, _MOST_FILES))))
