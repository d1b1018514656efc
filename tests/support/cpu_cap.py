"""A share of a CPU for each of some processes, kept by control groups of version 1 or 2. Needs root."""

import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

_ROOT = Path("/sys/fs/cgroup")
_PERIOD_US = 10_000
"""Short, so that a process that has used up its share waits for milliseconds."""


@contextmanager
def cpu_caps(pids: Sequence[int], share: float) -> Iterator[None]:
    """Each process, with all its threads, gets ``share`` of one CPU. Skips the test where that is not allowed."""
    parent = _ROOT / "cpu" if (_ROOT / "cpu" / "cpu.cfs_quota_us").exists() else _ROOT
    groups = [parent / f"remuda-test-{os.getpid()}-{uuid.uuid4().hex[:8]}" for _ in pids]
    made: list[Path] = []
    try:
        try:
            for group, pid in zip(groups, pids, strict=True):
                group.mkdir()
                made.append(group)
                _fill(group, pid, int(share * _PERIOD_US))
        except OSError as error:
            pytest.skip(f"no control groups with shares of a CPU can be made here: {error}")
        yield
    finally:
        for group in made:
            for left in (group / "cgroup.procs").read_text().split():
                (parent / "cgroup.procs").write_text(left)
            group.rmdir()


def _fill(group: Path, pid: int, quota_us: int) -> None:
    if (group / "cpu.cfs_quota_us").exists():
        (group / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
        (group / "cpu.cfs_quota_us").write_text(str(quota_us))
    else:
        (group / "cpu.max").write_text(f"{quota_us} {_PERIOD_US}")
    (group / "cgroup.procs").write_text(str(pid))
