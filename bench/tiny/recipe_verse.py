"""King James text from Debian's packages `bible-kjv` and `bible-kjv-text` (public domain).

The packages must be installed (`apt-get install bible-kjv`); the recipe itself downloads nothing.
"""

from __future__ import annotations

import re
import shutil
import subprocess

_BOOKS = re.compile(r"^([0-9]?[A-Z][A-Za-z0-9]*?)([0-9]+):([0-9]+) (.*)$")
HELD_OUT_CHAPTERS = frozenset({("Ruth", 2), ("Psa", 23), ("Jonah", 2), ("Mark", 4), ("Ge", 29), ("Prv", 15)})


def _lines() -> list[str]:
    program = shutil.which("bible")
    if program is None:
        raise SystemExit("the program 'bible' is missing: apt-get install bible-kjv bible-kjv-text")
    done = subprocess.run([program, "-f", "gen1:1-rev22:21"], check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


def chapters() -> dict[tuple[str, int], list[str]]:
    """(book, chapter) -> its verses, in the order of the book."""
    found: dict[tuple[str, int], list[str]] = {}
    for line in _lines():
        match = _BOOKS.match(line)
        if match is None:
            raise ValueError(f"unexpected line from the program 'bible': {line[:60]!r}")
        found.setdefault((match[1], int(match[2])), []).append(match[4].strip())
    return found


def passages(verses: list[str], num_characters: int) -> list[str]:
    """Consecutive verses joined to passages of about `num_characters` characters."""
    out: list[str] = []
    current = ""
    for verse in verses:
        current = f"{current} {verse}".strip()
        if len(current) >= num_characters:
            out.append(current)
            current = ""
    if current:
        out.append(current)
    return out


def split() -> tuple[list[list[str]], list[list[str]]]:
    """(training chapters, held-out chapters), each a list of verses."""
    everything = chapters()
    train = [v for k, v in everything.items() if k not in HELD_OUT_CHAPTERS]
    held = [v for k, v in everything.items() if k in HELD_OUT_CHAPTERS]
    return train, held
