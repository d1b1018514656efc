"""How what was found gets into docs/chaos.md."""

import pytest

from tests.chaos.cell import Row
from tests.chaos.comparison import Outcome
from tests.chaos.table import FILE, GROUPS, as_table, with_section

TEXT = "# Head\n\nWords.\n\n## `one`: first\n\nWhy.\n\nCommit abc, 3 s.\n\n| old |\n\n## `two`\n\n## Last\n\nEnd.\n"


def test_what_was_found_replaces_what_was_found_before_and_nothing_else() -> None:
    once = with_section(with_section(TEXT, "one", "Commit def, 4 s.\n\n| new |"), "two", "Commit 1\n\n| two |")
    assert once == (
        "# Head\n\nWords.\n\n## `one`: first\n\nWhy.\n\nCommit def, 4 s.\n\n| new |\n\n"
        "## `two`\n\nCommit 1\n\n| two |\n\n## Last\n\nEnd.\n"
    )
    assert with_section(once, "one", "Commit def, 4 s.\n\n| new |") == once


def test_every_group_has_its_section() -> None:
    text = FILE.read_text()
    for group in GROUPS:
        with_section(text, group, "Commit")
    with pytest.raises(ValueError, match="no section"):
        with_section(text, "nothing", "Commit")


def test_a_row_shows_what_clients_saw() -> None:
    row = Row("tp2", "a fault", "decode", Outcome(9, 1, 2, 3, 0.5, ("why",)), ("rank 1", "leader"), ("why",))
    assert as_table([row]).splitlines()[2] == "| tp2 | a fault | decode | 9 | 1 | 2 | 3 | 0.50 | rank 1, leader |"
