"""Responses that clients may come back for, bounded in number, bytes and time. Pure: the time is an argument."""

from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.errors import UnknownStream
from cluster.frontend.calls import Delta, Event
from cluster.frontend.responses.schema import CreateBody

_EVENT_BYTES = 200
_LOGPROB_BYTES = 400
"""What Python takes for one, roughly."""
_LEADERS_KEEP_S = 60.0
"""Twice their grace time."""


@dataclass
class StoredResponse:
    """``owner``: the tenant that asked, which alone may see it. ``messages``: the conversation with this request's
    input. ``num_request_bytes``: what these take. ``events``: what came so far. ``error``: why nothing more comes.
    """

    response_id: str
    owner: str
    body: CreateBody
    items: list[dict[str, Any]]
    messages: list[dict[str, Any]]
    created_unix_s: int
    num_request_bytes: int
    events: list[Event] = field(default_factory=list)
    error: BaseException | None = None
    is_over: bool = False

    @property
    def num_bytes(self) -> int:
        """Roughly what it takes."""
        return self.num_request_bytes + sum(map(_size, self.events))


@dataclass
class _Share:
    """What one tenant holds. ``ids``: oldest first."""

    ids: OrderedDict[str, None] = field(default_factory=OrderedDict)
    num_bytes: int = 0


def _size(event: Event) -> int:
    if not isinstance(event, Delta):
        return _EVENT_BYTES
    num_chars = len(event.text) + sum(len(call.arguments) for call in event.tool_calls)
    return _EVENT_BYTES + num_chars + 8 * len(event.token_ids) + _LOGPROB_BYTES * len(event.logprobs or ())


class ResponseStore:
    """Those that run are bounded by admission; those that are over, by these.

    Args:
        max_count: responses.
        max_bytes: of all of them.
        ttl_s: from a response's end.
    """

    def __init__(self, max_count: int = 10_000, max_bytes: int = 256 << 20, ttl_s: float = 3600.0) -> None:
        self._max_count = max_count
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._live: dict[str, StoredResponse] = {}
        self._over: OrderedDict[str, tuple[float, int, StoredResponse]] = OrderedDict()
        """By the time of their end, with it and their size."""
        self._num_bytes = 0
        self._shares: dict[str, _Share] = {}
        """By tenant."""
        self._removed: OrderedDict[str, float] = OrderedDict()
        """When a client had each removed, for as long as leaders may still have it."""

    def __len__(self) -> int:
        return len(self._live) + len(self._over)

    def begin(self, stored: StoredResponse) -> None:
        """It runs from now on."""
        self._live[stored.response_id] = stored

    def end(self, stored: StoredResponse, now_s: float) -> None:
        """It is over; the oldest of the tenant that holds most make room for it, so that one tenant's many do not cost
        the others theirs. One that was removed meanwhile stays so."""
        self._expire(now_s)
        if self._live.pop(stored.response_id, None) is None:
            return
        stored.events = joined(stored.events)
        num_bytes = stored.num_bytes
        self._over[stored.response_id] = (now_s, num_bytes, stored)
        self._num_bytes += num_bytes
        share = self._shares.setdefault(stored.owner, _Share())
        share.ids[stored.response_id] = None
        share.num_bytes += num_bytes
        while len(self._over) > self._max_count:
            self._drop_oldest(max(self._shares.values(), key=lambda share: len(share.ids)))
        while self._num_bytes > self._max_bytes:
            self._drop_oldest(max(self._shares.values(), key=lambda share: share.num_bytes))

    def forget(self, response_id: str, now_s: float) -> None:
        """It was refused before it began, or is another front end's now: there is nothing to remember of it here."""
        self._expire(now_s)
        self._live.pop(response_id, None)

    def get(self, response_id: str, owner: str, now_s: float) -> StoredResponse:
        """Raises UnknownStream where there is none, or it is somebody else's."""
        self._expire(now_s)
        stored = self._live.get(response_id)
        if stored is None and response_id in self._over:
            stored = self._over[response_id][2]
        if stored is None or stored.owner != owner:
            raise unknown(response_id)
        return stored

    def knows(self, response_id: str) -> bool:
        """Whether what ``get`` says is all that there is to say."""
        return response_id in self._live or response_id in self._over or response_id in self._removed

    def remove(self, response_id: str, now_s: float) -> None:
        """Nobody gets it any more, nor from the leaders that may still have it."""
        self._expire(now_s)
        if response_id in self._over:
            self._drop(response_id)
        self._live.pop(response_id, None)
        self._removed[response_id] = now_s

    def _expire(self, now_s: float) -> None:
        while self._removed and next(iter(self._removed.values())) + _LEADERS_KEEP_S <= now_s:
            self._removed.popitem(last=False)
        while self._over and next(iter(self._over.values()))[0] + self._ttl_s <= now_s:
            self._drop(next(iter(self._over)))

    def _drop_oldest(self, share: _Share) -> None:
        self._drop(next(iter(share.ids)))

    def _drop(self, response_id: str) -> None:
        _, num_bytes, stored = self._over.pop(response_id)
        self._num_bytes -= num_bytes
        share = self._shares[stored.owner]
        share.num_bytes -= num_bytes
        del share.ids[response_id]
        if not share.ids:
            del self._shares[stored.owner]


def unknown(response_id: str) -> UnknownStream:
    return UnknownStream(f"there is no response {response_id!r}, or it is no longer stored")


def joined(events: list[Event]) -> list[Event]:
    """The same with neighbouring deltas as one, without token ids that no log-probabilities belong to."""
    made: list[Event] = []
    for event in events:
        if not isinstance(event, Delta):
            made.append(event)
            continue
        last = made[-1] if made else None
        if isinstance(last, Delta) and not (last.tool_calls and event.text):
            made[-1] = _sum(last, event)
        else:
            made.append(_sum(Delta(event.choice, "", (), None, event.position, ()), event))
    return made


def _sum(one: Delta, other: Delta) -> Delta:
    has_logprobs = one.logprobs is not None or other.logprobs is not None
    calls = list(one.tool_calls)
    for call in other.tool_calls:
        if calls and call.name is None:
            calls[-1] = replace(calls[-1], arguments=calls[-1].arguments + call.arguments)
        else:
            calls.append(call)
    return Delta(
        one.choice,
        one.text + other.text,
        [*one.token_ids, *other.token_ids] if has_logprobs else (),
        [*(one.logprobs or ()), *(other.logprobs or ())] if has_logprobs else None,
        one.position,
        (),
        tuple(calls),
    )
