"""Which requests a leader has: those that run, with or without a reader, and those that ended not long ago. Pure: the
time is an argument."""

import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from cluster.replica.stream_history import StreamHistory

GRACE_S = 30.0
"""So long a request goes on without a reader, and one that ended is remembered."""
MAX_ENDED_WEIGHT = 16 << 20
"""Of all that ended (weight: stream_history), some 64 MiB. Beyond it the oldest go early; what somebody wants of them
is then computed again."""

_NUMBERED = re.compile(r"\.\d+(?:~\d+)?$")


def call_of(request_id: str) -> str:
    """The client's request that this sequence, or a later attempt at it, belongs to."""
    return _NUMBERED.sub("", request_id)


class HeldStreams:
    """Args:
    grace_s: as GRACE_S.
    max_ended_weight: as MAX_ENDED_WEIGHT.
    """

    def __init__(self, grace_s: float = GRACE_S, max_ended_weight: int = MAX_ENDED_WEIGHT) -> None:
        self._grace_s = grace_s
        self._max_ended_weight = max_ended_weight
        self._live: dict[str, StreamHistory] = {}
        self._unread: set[str] = set()
        """Live, and without a reader."""
        self._ended: OrderedDict[str, StreamHistory] = OrderedDict()
        """In the order in which they ended."""
        self._ended_weight = 0

    @property
    def num_live(self) -> int:
        return len(self._live)

    @property
    def is_empty(self) -> bool:
        return not (self._live or self._ended)

    def live(self) -> Iterator[StreamHistory]:
        return iter(list(self._live.values()))

    def live_one(self, request_id: str) -> StreamHistory | None:
        return self._live.get(request_id)

    def add_tokens(self, request_ids: Sequence[str], token_ids: Sequence[int]) -> None:
        """One for each; those of requests that are not live (any more) are nobody's."""
        live_one = self._live.get
        for request_id, token_id in zip(request_ids, token_ids, strict=True):
            if (stream := live_one(request_id)) is not None:
                stream.add_token(token_id)

    def find(self, request_id: str) -> StreamHistory | None:
        return self._live.get(request_id) or self._ended.get(request_id)

    def of_call(self, call_id: str) -> list[StreamHistory]:
        """All sequences of one client's request, those that run behind those that ended."""
        held = [*self._ended.values(), *self._live.values()]
        return [
            stream for stream in held if stream.request_id.startswith(call_id) and call_of(stream.request_id) == call_id
        ]

    def add(self, stream: StreamHistory) -> None:
        """One that begins to run."""
        self._forget_ended(stream.request_id)
        self._live[stream.request_id] = stream

    def note_unread(self, stream: StreamHistory, now_s: float) -> None:
        """Its reader is gone."""
        if stream.request_id in self._live:
            self._unread.add(stream.request_id)
            stream.kept_until_s = now_s + self._grace_s

    def note_read(self, stream: StreamHistory) -> None:
        """It has a reader again."""
        self._unread.discard(stream.request_id)

    def drop(self, stream: StreamHistory) -> None:
        """A live one was aborted: nobody wants to know more of it."""
        del self._live[stream.request_id]
        self._unread.discard(stream.request_id)

    def end(self, stream: StreamHistory, now_s: float) -> None:
        """A live one has all that it will get."""
        self.drop(stream)
        stream.kept_until_s = now_s + self._grace_s
        self._ended[stream.request_id] = stream
        self._ended_weight += stream.weight
        while self._ended_weight > self._max_ended_weight and len(self._ended) > 1:
            self._forget_ended(next(iter(self._ended)))

    def overdue(self, now_s: float) -> list[StreamHistory]:
        """Those that run and that nobody came back for. Forgets what ended a grace time ago and is not being read."""
        while self._ended:
            oldest = next(iter(self._ended.values()))
            if oldest.kept_until_s > now_s:
                break
            self._forget_ended(oldest.request_id)
        unread = [self._live[request_id] for request_id in sorted(self._unread)]
        return [stream for stream in unread if stream.kept_until_s <= now_s]

    def _forget_ended(self, request_id: str) -> None:
        """Whoever still reads it has it in hand."""
        if (stream := self._ended.pop(request_id, None)) is not None:
            self._ended_weight -= stream.weight
