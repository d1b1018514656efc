"""How what was found gets into docs/chaos.md."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos import table
from tests.chaos.cell import Choice, Row
from tests.chaos.comparison import Outcome
from tests.chaos.site import NotSettled
from tests.chaos.table import FILE, GROUPS, line_of, with_only, with_row

HEADER = (
    "| cluster | fault | in the middle of | requests | lost | duplicated | differ | longest pause, s | new | held | "
    "commit |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
)
OLD, OTHER, NEW, LAST = "| a | b | c | 1 |", "| a | b | d | 2 |", "| a | b | c | 3 |", "| a | e | d | 4 |"
TEXT = f"# Head\n\nWords.\n\n## `one`: first\n\nWhy.\n\n{HEADER}{OLD}\n{OTHER}\n\n## `two`\n\n## Last\n\nEnd.\n"


def test_a_row_replaces_the_one_of_the_same_cell_and_nothing_else() -> None:
    once = with_row(TEXT, "one", NEW)
    assert once == TEXT.replace(OLD, NEW)
    assert with_row(once, "one", LAST) == once.replace(OTHER, f"{OTHER}\n{LAST}")


def test_the_first_row_of_a_group_makes_its_table() -> None:
    assert with_row(TEXT, "two", NEW) == TEXT.replace("## `two`\n", f"## `two`\n\n{HEADER}{NEW}\n")


def test_a_whole_group_leaves_no_row_of_a_cell_that_is_no_more() -> None:
    text = with_row(TEXT, "two", OTHER)
    assert with_only(text, "one", [NEW]) == text.replace(f"{OLD}\n{OTHER}\n", f"{OLD}\n")
    assert with_only(text, "two", [OTHER, LAST]) == text


def test_every_group_has_its_section() -> None:
    text = FILE.read_text()
    for group in GROUPS:
        assert NEW in with_row(text, group, NEW)
    with pytest.raises(ValueError, match="no section"):
        with_row(text, "nothing", NEW)


def test_a_row_shows_what_clients_saw() -> None:
    row = Row("tp2", "a fault", "decode", Outcome(9, 1, 2, 3, 0.5, ("why",)), ("rank 1", "leader"), ("why",))
    assert line_of(row, "abc") == "| tp2 | a fault | decode | 9 | 1 | 2 | 3 | 0.50 | rank 1, leader | no | abc |"


def test_cells_of_a_group_can_be_chosen() -> None:
    assert (Choice().of("abc"), Choice(1, 3).of("abc")) == (["a", "b", "c"], ["a", "c"])
    for number in (0, 4):
        with pytest.raises(ValueError, match="this group has 3"):
            Choice(number).of("abc")


def test_a_group_that_does_not_come_to_rest_is_told_and_the_next_is_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def row(fault: str) -> Row:
        return Row("tp2", fault, "decode", Outcome(9, 0, 0, 0, 0.5, ()), ())

    def restless(directory: Path, choice: Choice) -> Iterator[Row]:
        yield row("the first")
        raise NotSettled("not settled within 60 s")

    monkeypatch.setattr(table, "GROUPS", {"restless": restless, "calm": lambda *arguments: iter([row("another")])})
    monkeypatch.setattr(sys, "argv", ["chaos", "--no-write"])
    assert table.main() == 1
    printed = capsys.readouterr().out
    lines = [line.strip(" |").split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    assert [(line[1], line[-2]) for line in lines] == [
        ("the first", "yes"),
        (table.CUT_SHORT, "no"),
        ("another", "yes"),
    ]
    assert "not settled within 60 s" in printed
