"""A copy of the commit in which one file is a mutant: nobody's working tree is touched."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.mutants.subjects import name_of

_SLOWER = 4.0
_LEAST_S = 60.0
"""A mutant that takes longer than this and so many times what the original does hangs: that is a death too."""


class Copy:
    """Args:
    root: of the working tree.
    path: where to; an empty directory.
    commit: which one.
    known: where it is kept how long the original took, by commit.
    """

    def __init__(self, root: Path, path: Path, commit: str, known: Path) -> None:
        self.path = path
        git = ["git", "-C", str(root)]
        found = subprocess.run([*git, "rev-parse", commit], check=True, capture_output=True, text=True)
        self.commit = found.stdout[:12]
        archive = subprocess.run([*git, "archive", self.commit], check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", path], input=archive, check=True)
        for built in [*root.glob("engine/**/*.so"), *root.glob("cluster/rpc/generated/*")]:
            target = path / built.relative_to(root)
            if built.is_file() and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(built, target)
        self._known = known
        self._taken_s: dict[str, float] = {}
        if known.exists():
            self._taken_s = json.loads(known.read_text()).get(self.commit, {})

    def try_out(self, path: str, hurdles: Sequence[tuple[str, ...]], source: str) -> tuple[str, float]:
        """The first hurdle that the mutant falls at ("" where it falls at none), and the seconds to there.

        Raises RuntimeError where the original falls.
        """
        file = self.path / path
        original = file.read_text()
        seconds = 0.0
        for hurdle in hurdles:
            limit_s = max(_LEAST_S, _SLOWER * self._original_s(hurdle))
            began_s = time.monotonic()
            try:
                file.write_text(source)
                how = self._falls_at(hurdle, limit_s)
            finally:
                file.write_text(original)
            seconds += time.monotonic() - began_s
            if how is not None:
                return name_of(hurdle) + how, seconds
        return "", seconds

    def _original_s(self, hurdle: tuple[str, ...]) -> float:
        name = name_of(hurdle)
        if name not in self._taken_s:
            began_s = time.monotonic()
            how = self._falls_at(hurdle, 600.0)
            if how is not None:
                raise RuntimeError(f"without any mutation {name} does not pass{how}")
            self._taken_s[name] = time.monotonic() - began_s
            self._known.write_text(json.dumps({self.commit: self._taken_s}))
        return self._taken_s[name]

    def _falls_at(self, hurdle: tuple[str, ...], limit_s: float) -> str | None:
        """None: it passes. Otherwise how, for the table."""
        environment = os.environ | {
            "PYTHONPATH": str(self.path),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": "1",
        }
        process = subprocess.Popen(
            [sys.executable, *hurdle],
            cwd=self.path,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return None if process.wait(limit_s) == 0 else ""
        except subprocess.TimeoutExpired:
            return ", which hangs"
        finally:
            with contextlib.suppress(ProcessLookupError):  # all of it has ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
