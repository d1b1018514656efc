"""Where benchmarks keep what they build: checkpoints, downloads and results, outside the repository."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """``$REMUDA_BENCH_CACHE``, or ``~/.cache/remuda-bench``."""
    named = os.environ.get("REMUDA_BENCH_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "remuda-bench"


def model_dir(name: str) -> Path:
    """The folder of the checkpoint that ``make bench-models`` builds under this name."""
    return cache_dir() / "models" / name
