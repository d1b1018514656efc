"""Which bytes each token stands for.

Text is decoded as bytes, token by token, never as strings: a character may be spread over several tokens. The two
forms of tokenizer that Llama-class checkpoints come with say it in their ``decoder`` (tokenizer.json):

- ByteLevel (Llama 3 and 4): each character of a token's string stands for one byte, by GPT-2's table;
- SentencePiece as converted by transformers (Llama 2, Mixtral): ``▁`` is a space and ``<0x0A>`` one raw byte; one
  leading space of a whole text is not part of it (``Strip``).
"""

import re
from collections.abc import Mapping
from typing import Any

from engine.errors import CheckpointError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_of_char() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 stands for itself, the other 68 bytes for characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return table


_BYTE_OF_CHAR = _byte_of_char()


class TokenBytes:
    """The bytes of every token of one tokenizer.

    Args:
        vocabulary: token id → its string in tokenizer.json, added tokens included.
        special_ids: control tokens, which have no text of their own.
        decoder: tokenizer.json's ``decoder``.

    Raises:
        CheckpointError: a decoder that is neither of the two forms.
    """

    def __init__(self, vocabulary: Mapping[int, str], special_ids: frozenset[int], decoder: Mapping[str, Any]) -> None:
        steps = decoder_steps(decoder)
        is_byte_level = any(step["type"] == "ByteLevel" for step in steps)
        convert = _byte_level if is_byte_level else _sentencepiece
        if not is_byte_level and not any(_is_space_marker(step) for step in steps):
            kinds = ", ".join(step["type"] for step in steps) or "none"
            raise CheckpointError(
                f"tokenizer.json has a decoder of kind {kinds}; ByteLevel and SentencePiece's forms are supported"
            )
        self._raw = {token_id: convert(token) for token_id, token in vocabulary.items()}
        self._visible = {id_: b"" if id_ in special_ids else raw for id_, raw in self._raw.items()}
        self.strips_leading_space = any(step["type"] in ("Strip", "Metaspace") for step in steps)
        """Whether one space at the beginning of a whole text (never of a continuation) is left out."""

    def visible(self, token_id: int) -> bytes:
        """What a reader sees: nothing for control tokens, nor for ids that the vocabulary does not hold (padding)."""
        return self._visible.get(token_id, b"")

    def raw(self, token_id: int) -> bytes:
        """The bytes of the token's string, control tokens included."""
        return self._raw.get(token_id, b"")

    def name(self, token_id: int) -> str:
        """The token as log-probabilities show it: incomplete characters as U+FFFD."""
        return self.raw(token_id).decode("utf-8", "replace")

    @property
    def longest(self) -> int:
        """Bytes of the longest token."""
        return max(map(len, self._raw.values()), default=1)


def decoder_steps(decoder: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A Sequence's steps, or the one decoder that there is."""
    if decoder.get("type") == "Sequence":
        return list(decoder["decoders"])
    return [decoder] if decoder else []


def _is_space_marker(step: Mapping[str, Any]) -> bool:
    if step["type"] == "Metaspace":
        return bool(step.get("replacement", "▁") == "▁")
    return bool(step["type"] == "Replace" and step.get("pattern") == {"String": "▁"} and step.get("content") == " ")


def _byte_level(token: str) -> bytes:
    """A token with a character outside the table (an added token with a space, say) stands for its own text."""
    try:
        return bytes(_BYTE_OF_CHAR[char] for char in token)
    except KeyError:
        return token.encode()


def _sentencepiece(token: str) -> bytes:
    if match := _BYTE_TOKEN.fullmatch(token):
        return bytes([int(match[1], 16)])
    return token.replace("▁", " ").encode()
