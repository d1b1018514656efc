"""docs/mutants.md: what was changed, what saw it, and why the others cannot be seen."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_EXPLAINED = Path(__file__).with_name("explained.yaml")


@dataclass(frozen=True)
class Verdict:
    """``killed_by`` is empty where the mutant lives on."""

    mutant: dict[str, Any]
    killed_by: str
    seconds: float

    def __str__(self) -> str:
        fate = f"killed by {self.killed_by}" if self.killed_by else "LIVES ON"
        change = f"{self.mutant['before']}  →  {self.mutant['after']}"
        return f"{self.mutant['file']}:{self.mutant['line']}  {change}  {fate}  {self.seconds:.1f} s"

    @property
    def reason(self) -> str:
        """Why nothing can see it; "" where nobody has said so. Lines are named by what is in them."""
        for entry in yaml.safe_load(_EXPLAINED.read_text()) or []:
            if all(entry[field] == self.mutant[field] for field in ("file", "before", "after")):
                return str(entry["reason"])
        return ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _row(verdict: Verdict) -> str:
    mutant = verdict.mutant
    fate = verdict.killed_by or f"**lives on**: {verdict.reason or 'not explained'}"
    change = f"`{_cell(mutant['before'])}` → `{_cell(mutant['after'])}`"
    return f"| {Path(mutant['file']).name}:{mutant['line']} | {change} | {_cell(fate)} | {verdict.seconds:.1f} |"


def write_table(
    path: Path, verdicts: list[Verdict], num_generated: dict[str, int], num_left: int, commit: str, seed: int
) -> int:
    """``num_left``: drawn, and not tried out yet. Returns 1 where a mutant lives on without a reason."""
    num_killed = sum(bool(verdict.killed_by) for verdict in verdicts)
    num_explained = sum(not verdict.killed_by and bool(verdict.reason) for verdict in verdicts)
    summary = (
        f"{len(verdicts)} mutants of {sum(num_generated.values()):,}: {num_killed} killed "
        f"({num_killed / len(verdicts):.0%}), {num_explained} live on for a reason, "
        f"{len(verdicts) - num_killed - num_explained} without one."
    )
    if num_left:
        summary += f" {num_left} more are drawn and have not been tried out yet."
    verdicts = sorted(verdicts, key=lambda verdict: (verdict.mutant["file"], verdict.mutant["line"]))
    drawn = Counter(verdict.mutant["file"] for verdict in verdicts)
    killed = Counter(verdict.mutant["file"] for verdict in verdicts if verdict.killed_by)
    lines = [
        "# Mutants",
        "",
        "Small defects put into what decides who computes a stream, what is replayed and who owns a block, and what",
        "saw them. Cosmic Ray made all mutants of these files, types and equal code left out; a seed drew places, and",
        "one mutant of each. Each ran against the tests, cheapest first, then the simulation, to the first failure.",
        "`make mutants` writes this file.",
        "",
        f"Commit {commit}, seed {seed}. {summary}",
        "",
        "| file | generated | tried | killed |",
        "|---|---|---|---|",
        *(f"| {file} | {num} | {drawn[file]} | {killed[file]} |" for file, num in num_generated.items()),
        "",
        "| where | change | killed by | seconds |",
        "|---|---|---|---|",
        *map(_row, verdicts),
    ]
    path.write_text("\n".join(lines) + "\n")
    print(summary)
    return int(num_killed + num_explained < len(verdicts))
