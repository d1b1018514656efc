"""The repository's files, as the architecture tests see them."""

import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CODE = ("cluster", "engine", "bench", "protos", "tests")
_SKIPPED_DIRS = {"__pycache__", "build", "dist", "out", "node_modules"}


def files(*tops: str) -> Iterator[Path]:
    """Every file below the given top-level names (all of the repository without any), caches and outputs excepted."""
    for start in [ROOT / top for top in tops] or [ROOT]:
        for folder, dirs, names in os.walk(start):
            # Hidden folders are caches and environments; .ci is ours.
            dirs[:] = sorted(d for d in dirs if d not in _SKIPPED_DIRS and (d == ".ci" or not d.startswith(".")))
            yield from (Path(folder) / name for name in sorted(names))


def python_files(*tops: str) -> Iterator[Path]:
    """Python files that people wrote: what protoc generates is left out."""
    for path in files(*(tops or CODE)):
        if path.suffix == ".py" and "generated" not in path.parts:
            yield path


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    """``cluster/router/pick.py`` → ``cluster.router.pick``; a package's ``__init__`` gives the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
