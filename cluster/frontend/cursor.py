"""How far a client has read, and what is left for it. Pure.

A client that comes back names the last event that it got. Its id says of every choice how many tokens, characters of
text and pieces of tool calls came before, and whether its end did: ``REQUEST/0.12.40;1.9.33f`` is 12 tokens and 40
characters of choice 0, and choice 1 as a whole. With tool calls a third number follows: one for each call begun and one
for each character of arguments. ``REQUEST/…;u`` has the usage behind it too. How the tokens were grouped into events
may differ between two readings of a request; what they add up to does not.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from cluster.frontend.calls import Delta, Echo, Event, Finished, Started, ToolCallDelta, Usage
from engine.errors import InvalidRequest

_CHOICE = re.compile(r"(\d{1,9})\.(\d{1,9})\.(\d{1,9})(?:\.(\d{1,9}))?(f?)")
_MAX_CHARS = 8192


@dataclass(frozen=True)
class ChoicePosition:
    """What of one choice came: tokens, characters of text, and of tool calls as the module says."""

    num_tokens: int = 0
    num_chars: int = 0
    num_of_tools: int = 0
    is_finished: bool = False


class Cursor:
    """Where one reader is.

    Args:
        call_id: the request.
        positions: by choice; one that has none had nothing.
        has_usage: all came.
    """

    def __init__(
        self, call_id: str, positions: Mapping[int, ChoicePosition] | None = None, has_usage: bool = False
    ) -> None:
        self.call_id = call_id
        self.positions = dict(positions or {})
        self.has_usage = has_usage

    @classmethod
    def parse(cls, event_id: str) -> "Cursor":
        """Raises InvalidRequest."""
        call_id, slash, rest = event_id.rpartition("/")
        parts = [part for part in rest.split(";") if part]
        has_usage = bool(parts) and parts[-1] == "u"
        found = [_CHOICE.fullmatch(part) for part in (parts[:-1] if has_usage else parts)]
        if not (slash and call_id) or len(event_id) > _MAX_CHARS or None in found:
            raise InvalidRequest("Last-Event-ID must be the id of an event of a resumable request", "Last-Event-ID")
        positions = {
            int(match[1]): ChoicePosition(int(match[2]), int(match[3]), int(match[4] or 0), bool(match[5]))
            for match in found
            if match is not None
        }
        return cls(call_id, positions, has_usage)

    def event_id(self) -> str:
        """The id of the event that was noted last."""
        parts = []
        for choice, position in sorted(self.positions.items()):
            tools = f".{position.num_of_tools}" if position.num_of_tools else ""
            end = "f" if position.is_finished else ""
            parts.append(f"{choice}.{position.num_tokens}.{position.num_chars}{tools}{end}")
        return f"{self.call_id}/{';'.join([*parts, *(['u'] if self.has_usage else [])])}"

    def copy(self) -> "Cursor":
        return Cursor(self.call_id, self.positions, self.has_usage)

    def note(self, event: Event) -> None:
        """This event goes to the reader."""
        if isinstance(event, Usage):
            self.has_usage = True
        elif not isinstance(event, Started):
            before = self.positions.get(event.choice, ChoicePosition())
            if isinstance(event, Delta):
                before = replace(
                    before,
                    num_tokens=before.num_tokens + len(event.token_ids),
                    num_chars=before.num_chars + len(event.text),
                    num_of_tools=before.num_of_tools + sum(map(_size, event.tool_calls)),
                )
            elif isinstance(event, Finished):
                before = replace(before, is_finished=True)
            self.positions[event.choice] = before


def parts_of(event: Event) -> Iterator[Event]:
    """An event as such that each is one chunk of a stream, so that each chunk can have an id of its own."""
    if not isinstance(event, Delta) or not event.tool_calls:
        yield event
        return
    if event.text or event.token_ids:
        yield replace(event, tool_calls=())
    for call in event.tool_calls:
        yield replace(
            event,
            text="",
            token_ids=(),
            logprobs=None,
            position=event.position + len(event.token_ids),
            text_offsets=(),
            tool_calls=(call,),
        )


class Remainder:
    """Takes a request's events from the beginning, and leaves out what a reader had.

    Args:
        had: where the reader was.
    """

    def __init__(self, had: Cursor) -> None:
        self._had = had.copy()
        self._left = dict(self._had.positions)
        """Of each choice: what is still to be left out."""

    def of(self, event: Event) -> Event | None:
        """What of this event is new."""
        if isinstance(event, Usage):
            return None if self._had.has_usage else event
        if isinstance(event, Started):
            return None if self._left or self._had.has_usage else event
        left = self._left.get(event.choice)
        if left is None:
            return event
        if isinstance(event, Echo):
            return None
        if isinstance(event, Finished):
            return None if left.is_finished else event
        return self._rest(event, left)

    def _rest(self, event: Delta, left: ChoicePosition) -> Delta | None:
        num_tokens = min(left.num_tokens, len(event.token_ids))
        num_chars = min(left.num_chars, len(event.text))
        calls, num_of_tools = _without(event.tool_calls, left.num_of_tools)
        self._left[event.choice] = ChoicePosition(
            left.num_tokens - num_tokens, left.num_chars - num_chars, left.num_of_tools - num_of_tools, left.is_finished
        )
        rest = replace(
            event,
            text=event.text[num_chars:],
            token_ids=event.token_ids[num_tokens:],
            logprobs=None if event.logprobs is None else event.logprobs[num_tokens:],
            position=event.position + num_tokens,
            text_offsets=event.text_offsets[num_tokens:],
            tool_calls=calls,
        )
        return rest if rest.text or rest.token_ids or rest.tool_calls else None


def _size(call: ToolCallDelta) -> int:
    return (call.name is not None) + len(call.arguments)


def _without(calls: Sequence[ToolCallDelta], size: int) -> tuple[list[ToolCallDelta], int]:
    """The pieces behind the first ``size``, and how much was left out."""
    rest: list[ToolCallDelta] = []
    left = size
    for call in calls:
        if left >= _size(call):
            left -= _size(call)
        elif left:
            begun = call.name is not None
            rest.append(ToolCallDelta(call.index, None, call.arguments[left - begun :]))
            left = 0
        else:
            rest.append(call)
    return rest, size - left
