"""A model's text, in pieces → what is text for the client and what is tool calls.

At the beginning of a message any form of call is taken (``grammar``); further on only what a marker announces, so that
a bracket in a sentence stays one. What turns out to be no call becomes text, complete and in order. What has been given
out as part of a call stays that: if the call breaks off or goes wrong afterwards, its arguments end there, and the rest
is text. How the text was cut into pieces makes no difference.
"""

import re
from collections.abc import Collection

from cluster.frontend.calls import ToolCallDelta
from cluster.frontend.tools.cursor import Cursor, Malformed, Steps
from cluster.frontend.tools.grammar import OPENING, read_calls

_MAY_BEGIN = re.compile(f"[{re.escape(''.join({opening[0] for opening in OPENING}))}]")

Piece = str | ToolCallDelta


class ToolCallParser:
    """Args:
    names: the request's tools.
    only_first: stop after one call (``is_done``).
    """

    def __init__(self, names: Collection[str], only_first: bool = False) -> None:
        self._names = frozenset(names)
        self._only_first = only_first
        self.num_calls = 0
        """Begun."""
        self.num_complete = 0
        self.is_done = False
        """One call was asked for and is complete; nothing more is to be fed."""
        self._held = ""
        """What an attempt has seen and is neither text nor part of a call yet."""
        self._pieces: list[Piece] = []
        self._begin(is_marked=False)

    @property
    def has_only_complete_calls(self) -> bool:
        """Whether there are calls, and each has all of its arguments."""
        return 0 < self.num_calls == self.num_complete

    def feed(self, text: str) -> list[Piece]:
        """The next piece of the text → what is certain now."""
        assert not self.is_done
        self._advance(self._held + text, len(self._held))
        return self._take()

    def finish(self) -> list[Piece]:
        """The text is over: what was held back."""
        while self._reader is not None and not self.is_done:
            if self._step(""):
                break  # what is held are spaces and closing marks after the last call
            rest = self._give_up(self._held)
            self._advance(rest, 0)
        self._held = ""
        return self._take()

    def _advance(self, todo: str, index: int) -> None:
        """Go through ``todo``, of which the attempt has seen the first ``index`` characters."""
        start = 0
        """What comes before it is settled."""
        while index < len(todo) and not self.is_done:
            if self._reader is None:
                found = _MAY_BEGIN.search(todo, index)
                index = found.start() if found else len(todo)
                self._say(todo[start:index])
                start = index
                if found:
                    self._begin(is_marked=True)
            elif not self._step(todo[index]):
                rest = self._give_up(todo[start:])
                index = start = len(todo) - len(rest)
            else:
                index += 1
                if self._settle():
                    start = index
        self._held = todo[start:]

    def _begin(self, is_marked: bool) -> None:
        self._cursor = Cursor()
        self._reader: Steps[None] | None = read_calls(self._cursor, self._names, is_marked)
        self._num_before = self.num_complete
        self._has_found = False
        """Whether this attempt has given out a part of a call."""

    def _step(self, char: str) -> bool:
        """Show the attempt its next character. False where this is no call."""
        assert self._reader is not None
        self._cursor.char = char
        try:
            next(self._reader, None)
        except Malformed:
            return False
        return True

    def _settle(self) -> bool:
        """Take what the attempt has found. Whether its last character belongs to a call."""
        cursor = self._cursor
        is_settled, cursor.is_settled = cursor.is_settled, False
        for name, arguments in cursor.findings:
            if name is not None:
                self._pieces.append(ToolCallDelta(self.num_calls, name, ""))
                self.num_calls += 1
            self._pieces.append(ToolCallDelta(self.num_calls - 1, None, arguments))
        cursor.findings.clear()
        if cursor.num_complete + self._num_before != self.num_complete:
            self.num_complete = cursor.num_complete + self._num_before
            self.is_done = self._only_first
        self._has_found = self._has_found or is_settled
        return is_settled

    def _give_up(self, rest: str) -> str:
        """This attempt is over: what of ``rest`` is to be looked at again, for marks only."""
        self._reader = None
        if self._has_found:
            return rest
        self._say(rest[:1])
        return rest[1:]

    def _say(self, text: str) -> None:
        if text:
            self._pieces.append(text)

    def _take(self) -> list[Piece]:
        """The pieces so far, as few as there can be."""
        merged: list[Piece] = []
        for piece in self._pieces:
            last = merged[-1] if merged else None
            if isinstance(piece, str) and isinstance(last, str):
                merged[-1] = last + piece
            elif (
                isinstance(piece, ToolCallDelta)
                and isinstance(last, ToolCallDelta)
                and piece.name is None
                and last.name is None
            ):
                merged[-1] = ToolCallDelta(last.index, None, last.arguments + piece.arguments)
            else:
                merged.append(piece)
        self._pieces.clear()
        return merged
