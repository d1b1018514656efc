"""Token ids to text, as they come. O(1) amortised per token: no token is decoded twice."""

import codecs
from collections.abc import Iterable, Sequence

from cluster.frontend.token_bytes import TokenBytes

_LONGEST_CHARACTER_BYTES = 4
_TAIL_TOKENS = 8
"""Tokens before a text's beginning that can hold the start of its first character (control tokens have no bytes)."""


class Detokenizer:
    """The text of one growing sequence of tokens.

    What ``feed`` gives is final and never ends inside a character: an unfinished one waits for its other tokens.
    Bytes that are no UTF-8 become U+FFFD, as in ``bytes.decode("utf-8", "replace")`` of the whole.

    Args:
        table: the tokenizer's bytes.
        context: the tokens before the first; a character that they begin is finished here.
        shown: control tokens that are part of the text, for whoever looks for them there.
    """

    def __init__(self, table: TokenBytes, context: Sequence[int] = (), shown: frozenset[int] = frozenset()) -> None:
        self._visible = table.visible
        self._raw = table.raw
        self._shown = shown
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder.decode(_unfinished(b"".join(map(table.visible, context[-_TAIL_TOKENS:]))))

    @property
    def is_inside_character(self) -> bool:
        return bool(self._decoder.getstate()[0])

    def feed(self, token_id: int) -> str:
        """The text that this token completes, often its own, sometimes none."""
        return self._decoder.decode(self._raw(token_id) if token_id in self._shown else self._visible(token_id))

    def feed_whole(self, token_ids: Sequence[int]) -> str | None:
        """The text of all these tokens, where it begins and ends between characters; None, and nothing done, where not.

        Control tokens that are shown are looked for by ``feed`` only.
        """
        if self._shown or self.is_inside_character:
            return None
        before = self._decoder.getstate()
        text = self._decoder.decode(b"".join(map(self._visible, token_ids)))
        if self._decoder.getstate()[0]:
            self._decoder.setstate(before)
            return None
        return text

    def finish(self) -> str:
        """The sequence is over: what an unfinished character leaves, U+FFFD or nothing."""
        return self._decoder.decode(b"", final=True)


def _unfinished(tail: bytes) -> bytes:
    """The bytes at the end of ``tail`` that begin a character and do not finish it."""
    for length in range(1, min(_LONGEST_CHARACTER_BYTES, len(tail) + 1)):
        byte = tail[-length]
        if byte >= 0xC0:
            needed = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return tail[-length:] if needed > length else b""
        if byte < 0x80:
            return b""
    return b""


def decode_text(table: TokenBytes, token_ids: Iterable[int], with_special: bool = False) -> str:
    """A whole text, from its beginning. ``with_special`` shows control tokens too."""
    bytes_of = table.raw if with_special else table.visible
    text = b"".join(map(bytes_of, token_ids)).decode("utf-8", "replace")
    return text.removeprefix(" ") if table.strips_leading_space else text
