"""What a gang did last: every plan and every answer as they crossed the channel, requests as they came, and events.

Bounded by bytes; entries are kept as they are and only made readable when somebody asks, so keeping them costs a step
well below a microsecond each. docs/health.md has the form of a file. It holds the requests' tokens.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec

from engine.request import Request

FORMAT = 1
MAX_BYTES = 16 * 2**20
STATES_PER_RECORD = 4
"""How often, over ``MAX_BYTES``, the engine's state is noted: a replay begins at the first that is left."""
PART_BYTES = 2**18
_ENTRY_BYTES = 120
"""What an entry takes besides its payload, roughly."""

_Entry = tuple[float, str, Any, int]
"""When (seconds of the monotonic clock), its kind, what there is to tell, and roughly its bytes."""


class FlightRecord:
    """Of one replica, over all its epochs. Any thread may add to it or read it.

    Args:
        max_bytes: roughly; the oldest entries go first. Requests stay as long as they live, and states come on top.
        is_live: whether a request has not ended yet.
    """

    def __init__(self, max_bytes: int = MAX_BYTES, is_live: Callable[[str], bool] = lambda request_id: False) -> None:
        self._max_bytes = max_bytes
        self._is_live = is_live
        self._facts: dict[str, Any] = {}
        self._entries: deque[_Entry] = deque()
        self._num_bytes = 0
        self._num_bytes_lost = 0
        self._num_lost = 0
        self._next_state_at = max_bytes // STATES_PER_RECORD
        self._old_requests: list[_Entry] = []
        """Those that came before the oldest entry and were live then, or are in a state that is left."""
        self._in_states: deque[frozenset[int]] = deque()
        """The arrivals of the requests in each of these states."""

    def describe(self, is_live: Callable[[str], bool] | None = None, **facts: Any) -> None:
        """For the head of the file: what the replica is."""
        self._facts.update(facts)
        if is_live is not None:
            self._is_live = is_live

    def plan(self, now_s: float, data: bytes) -> None:
        """An encoded StepPlan has left."""
        self._add((now_s, "plan", data, len(data) + _ENTRY_BYTES))

    def answer(self, now_s: float, rank: int, data: bytes) -> None:
        """What a rank sent, encoded, has arrived."""
        # What is too old goes when the next plan, which waits for this call, has left.
        num_bytes = len(data) + _ENTRY_BYTES
        self._entries.append((now_s, "answer", (rank, data), num_bytes))
        self._num_bytes += num_bytes

    def request(self, request: Request, **fields: Any) -> None:
        """The engine has taken it; ``fields`` say when. ``arrival``, of theirs, counts requests."""
        self._add((time.monotonic(), "request", (request, fields), 8 * len(request.token_ids) + 4 * _ENTRY_BYTES))

    def event(self, kind: str, **fields: Any) -> None:
        """Anything else; ``fields`` are JSON values."""
        self._add((time.monotonic(), kind, fields, 4 * _ENTRY_BYTES))

    @property
    def wants_state(self) -> bool:
        """Whether so much has come since the engine's state was noted that it is time again."""
        return self._num_bytes_lost + self._num_bytes >= self._next_state_at

    def state(self, state: Any, arrivals: Iterable[int]) -> None:
        """All that the engine holds, for msgspec to encode; nobody changes it any more. It is not counted in
        ``max_bytes``: it is as large as the cache and the requests make it, and there are five at most.

        ``arrivals``: of the requests in it, as ``request`` was told of them.
        """
        self._in_states.append(frozenset(arrivals))
        self._next_state_at = self._num_bytes_lost + self._num_bytes + self._max_bytes // STATES_PER_RECORD
        self._add((time.monotonic(), "state", {"state": state}, _ENTRY_BYTES))

    def _add(self, entry: _Entry) -> None:
        self._entries.append(entry)
        self._num_bytes += entry[3]
        while self._num_bytes > self._max_bytes and len(self._entries) > 1:
            old = self._entries.popleft()
            self._num_bytes -= old[3]
            self._num_bytes_lost += old[3]
            self._num_lost += 1
            if old[1] == "state":
                self._in_states.popleft()
            elif old[1] == "request" and self._is_needed(old):
                self._keep(old)

    def _is_needed(self, entry: _Entry) -> bool:
        request, fields = entry[2]
        arrival = fields.get("arrival")
        return self._is_live(request.request_id) or any(arrival in arrivals for arrivals in list(self._in_states))

    def _keep(self, entry: _Entry) -> None:
        """Some of those kept before have ended."""
        self._old_requests.append(entry)
        if len(self._old_requests) % 64 == 0:
            self._old_requests = list(filter(self._is_needed, self._old_requests))

    def lines(self) -> Iterator[bytes]:
        """The file: JSON lines, the head first."""
        entries = list(self._entries)  # first: what has made room by now is counted in num_lost
        now_s, unix_s = time.monotonic(), time.time()
        head = {"kind": "head", "format": FORMAT, "monotonic_s": now_s, "unix_s": unix_s, "num_lost": self._num_lost}
        head |= self._facts
        yield msgspec.json.encode(head) + b"\n"
        for entry in [*filter(self._is_needed, list(self._old_requests)), *entries]:
            yield msgspec.json.encode(_readable(entry)) + b"\n"


def parts(lines: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes in parts of at most PART_BYTES."""
    waiting = bytearray()
    for line in lines:
        waiting += line
        while len(waiting) >= PART_BYTES:
            yield bytes(waiting[:PART_BYTES])
            del waiting[:PART_BYTES]
    if waiting:
        yield bytes(waiting)


def _readable(entry: _Entry) -> dict[str, Any]:
    at_s, kind, payload, _ = entry
    line: dict[str, Any] = {"kind": kind, "at_s": at_s}
    if kind == "plan":
        line["message"] = msgspec.msgpack.decode(payload)
    elif kind == "answer":
        rank, data = payload
        line |= {"rank": rank, "message": msgspec.msgpack.decode(data)}
    elif kind == "request":
        request, fields = payload
        line |= {"request": msgspec.to_builtins(request), **fields}
    else:
        line |= payload
    return line
