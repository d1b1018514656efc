"""``make mutants``: are the tests and the simulation good enough to see small defects in what must not have any?

Cosmic Ray makes all its mutants of the files in tests/mutants/subjects.py, a seed draws some of different places, and
each runs, in a copy of the commit, against the tests and the simulation until one fails. Those that live on are in
docs/mutants.md with the reason (tests/mutants/explained.yaml), or they are holes in the tests. A run that was
interrupted goes on where it was; --seconds ends one early.
"""

import argparse
import hashlib
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.mutants.commit_copy import Copy
from tests.mutants.subjects import SUBJECTS, Subject
from tests.mutants.table import Verdict, write_table

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "out" / "mutants"

Mutant = dict[str, Any]
"""See tests.mutants.generate."""


def generated(python: Path, copy: Copy, subject: Subject) -> list[Mutant]:
    """Kept on disk: they follow from the file alone."""
    source = (copy.path / subject.file).read_bytes()
    kept = WORK / f"{Path(subject.file).stem}-{hashlib.sha256(source).hexdigest()[:12]}.jsonl"
    if not kept.exists():
        command = [str(python), str(ROOT / "tests/mutants/generate.py"), subject.file]
        made = subprocess.run(command, cwd=copy.path, check=True, capture_output=True, timeout=600)
        kept.write_bytes(made.stdout)
    return [json.loads(line) for line in kept.read_text().splitlines()]


def drawn(mutants: list[Mutant], subject: Subject, seed: int) -> list[Mutant]:
    """One of each of ``num_mutants`` places."""
    chance = random.Random(f"{seed} {subject.file}")
    by_place: dict[tuple[int, int], list[Mutant]] = {}
    for mutant in mutants:
        by_place.setdefault((mutant["line"], mutant["column"]), []).append(mutant)
    places = chance.sample(sorted(by_place), min(subject.num_mutants, len(by_place)))
    return sorted((chance.choice(by_place[place]) for place in places), key=lambda mutant: mutant["line"])


def _in_turns(rows: list[list[tuple[Subject, Mutant]]]) -> list[tuple[Subject, Mutant]]:
    """One of each, again and again: a run that ends early has seen something of every file."""
    return [each for turn in itertools.zip_longest(*rows) for each in turn if each is not None]


def _key(mutant: Mutant) -> str:
    return hashlib.sha256(mutant["source"].encode()).hexdigest()


def main() -> int:
    """Exit status 1 where a mutant lives on that nobody has explained, 3 where the time ran out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=6)
    parser.add_argument("--commit", default="HEAD")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no other mutant after so long")
    parser.add_argument("--python", type=Path, default=ROOT / ".venv-mutants/bin/python", help="has Cosmic Ray")
    parser.add_argument("--again", action="store_true", help="forget which mutants lived on in the last run")
    parser.add_argument("--quick", action="store_true", help="only the cheapest test; the others stay to be tried out")
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    log = WORK / f"verdicts-{options.seed}.jsonl"
    known = {line["key"]: line for line in map(json.loads, log.read_text().splitlines())} if log.exists() else {}
    if options.again:
        known = {key: line for key, line in known.items() if line["killed_by"]}
    began_s = time.monotonic()
    verdicts: list[Verdict] = []
    with tempfile.TemporaryDirectory(prefix="remuda-mutants-") as directory:
        copy = Copy(ROOT, Path(directory), options.commit, WORK / "original.json")
        generated_of = {subject.file: generated(options.python, copy, subject) for subject in SUBJECTS}
        work = _in_turns(
            [
                [(subject, each) for each in drawn(generated_of[subject.file], subject, options.seed)]
                for subject in SUBJECTS
            ]
        )
        for subject, mutant in work:
            key = _key(mutant)
            if key not in known:
                if time.monotonic() - began_s > options.seconds:
                    continue
                hurdles = subject.hurdles[:1] if options.quick else subject.hurdles
                killed_by, seconds = copy.try_out(subject.file, hurdles, mutant["source"])
                if options.quick and not killed_by:
                    continue
                known[key] = {"key": key, "killed_by": killed_by, "seconds": seconds}
                with log.open("a") as file:
                    file.write(json.dumps(known[key]) + "\n")
            fate = known[key]
            verdicts.append(Verdict(mutant, fate["killed_by"], fate["seconds"]))
            print(verdicts[-1], flush=True)
        commit = copy.commit
    num_left = len(work) - len(verdicts)
    num_generated = {file: len(mutants) for file, mutants in generated_of.items()}
    status = write_table(ROOT / "docs/mutants.md", verdicts, num_generated, num_left, commit, options.seed)
    return 3 if num_left else status


if __name__ == "__main__":
    sys.exit(main())
