"""What the readers of one attempt at tool calls share: the character they stand at, and where their findings go.

A reader is a generator that is resumed once per character, so that a text may come in any pieces. It begins and ends
standing at a character that it has not consumed; ``yield`` consumes it and comes back at the next one. After the text's
end the character is empty, which no reader takes for anything.
"""

from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")

Steps = Generator[None, None, T]

WHITESPACE = " \t\r\n"
MAX_DEPTH = 64
"""Of lists and objects in each other. Models write a handful; every level costs time at each character."""


class Malformed(Exception):
    """This text is no tool call. Never leaves the package."""


class Cursor:
    """One attempt's place in the text.

    ``findings`` are calls' parts in the form (name or None, argument text).
    """

    def __init__(self) -> None:
        self.char = ""
        self.findings: list[tuple[str | None, str]] = []
        self.num_complete = 0
        """Calls that have ended."""
        self.is_settled = False
        """Whether the present character belongs to calls for sure, and all before it. The driver takes it back."""

    def find(self, name: str | None, arguments: str) -> None:
        self.findings.append((name, arguments))
        self.is_settled = True

    def complete(self) -> None:
        """The present character is a call's last."""
        self.num_complete += 1
        self.is_settled = True

    def close(self) -> None:
        """The present character ends what stands around calls. Before any call it says nothing."""
        self.is_settled = self.num_complete > 0


def skip_whitespace(cursor: Cursor) -> Steps[None]:
    while cursor.char and cursor.char in WHITESPACE:
        yield


def expect(cursor: Cursor, char: str) -> Steps[None]:
    """Raises Malformed unless this is the next character."""
    if cursor.char != char:
        raise Malformed
    yield
