"""The conformance table: which model, in which format and layout, was held against an independent implementation.

A test says what it holds with the fixture ``conforms``; ``--conformance-table`` prints what all of them gave as a table
when the run is over, and writes it where ``--conformance-table=FILE`` names a file. A cell is ``ok`` only where every
test of it passed.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

_PROPERTY = "conformance"
_STANDARD_OUTPUT = "-"

Conforms = Callable[..., None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--conformance-table",
        nargs="?",
        const=_STANDARD_OUTPUT,
        help="print the table of model, format and layout (and write it to this file, as Markdown)",
    )


@pytest.fixture
def conforms(record_property: Callable[[str, object], None]) -> Conforms:
    """Say what a test holds against whom: ``conforms("Mixtral", "float32", tp=2, ep=2, oracle="transformers")``."""

    def record(model: str, weights: str, *, pp: int = 1, dp: int = 1, tp: int = 1, ep: int = 1, oracle: str) -> None:
        layout = f"pp{pp} " * (pp > 1) + f"dp{dp} " * (dp > 1) + f"tp{tp}" + f" ep{ep}" * (ep > 1)
        record_property(_PROPERTY, (model, weights, layout, oracle))

    return record


def table(outcomes: list[tuple[tuple[str, str, str, str], bool]]) -> list[str]:
    """Markdown lines: one row for each model, format and oracle, one column for each layout."""
    cells: dict[tuple[str, str, str], dict[str, bool]] = {}
    for (model, weights, layout, oracle), has_passed in outcomes:
        row = cells.setdefault((model, weights, oracle), {})
        row[layout] = row.get(layout, True) and has_passed
    layouts = sorted({layout for row in cells.values() for layout in row})
    lines = [
        "| model | weights | held against | " + " | ".join(layouts) + " |",
        "|---|---|---|" + "---|" * len(layouts),
    ]
    for (model, weights, oracle), row in sorted(cells.items()):
        marks = [{True: "ok", False: "FAILED", None: ""}[row.get(layout)] for layout in layouts]
        lines.append(f"| {model} | {weights} | {oracle} | " + " | ".join(marks) + " |")
    return lines


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    target = terminalreporter.config.getoption("--conformance-table")
    if target is None:
        return
    outcomes = [
        (tuple(value), category == "passed")
        for category in ("passed", "failed")
        for report in terminalreporter.stats.get(category, [])
        for name, value in report.user_properties
        if name == _PROPERTY
    ]
    lines = table(outcomes)
    terminalreporter.section("conformance")
    terminalreporter.write_line("\n".join(lines))
    if target != _STANDARD_OUTPUT:
        Path(target).write_text("\n".join(lines) + "\n", encoding="utf-8")
