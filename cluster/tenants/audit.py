"""The audit log: one line for each request, whoever made it and whatever became of it."""

import contextlib
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Final

import msgspec

from cluster.identity.principal import Principal
from cluster.tenants.line_log import LineLog
from cluster.tenants.record import UsageRecord, shown

CLIENT_LEFT: Final = 499, "cancelled"
"""Status and outcome of a request whose answer nobody took."""


class AuditRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """No text of prompt or answer is in it.

    ``request_id``: the response's ``x-request-id``. ``tenant``, ``key_id``: empty where nobody knows who asked.
    ``route``: method and path over HTTP, service and method over gRPC; what a path names is ``*``, an unknown path
    ``other``. ``status``: HTTP's, or the one that stands for gRPC's. ``outcome``: ``completed``, ``cancelled``,
    ``refused``, ``internal``, or what kind of error: its class, or gRPC's code. What follows ``duration_s`` is there
    where the request had the model called: ``call_id`` is the answer's id, and the ``request_id`` of the usage log.
    """

    time_unix_s: float
    request_id: str
    tenant: str
    key_id: str
    route: str
    status: int
    outcome: str
    duration_s: float
    call_id: str | None = None
    model: str | None = None
    num_prompt_tokens: int | None = None
    num_cached_tokens: int | None = None
    num_completion_tokens: int | None = None
    trace_id: str = ""


class Audited:
    """One request. Its line is written when both its response and the call of the model that it made, if it made one,
    are over: the one may outlive the other. A call that begins when the response is over has a line of its own.

    Args:
        request_id: the gate's name for it.
        route: what was asked for.
        write: takes the line; None: nobody does.
    """

    def __init__(
        self, request_id: str = "", route: str = "", write: Callable[[AuditRecord], None] | None = None
    ) -> None:
        self._request_id = request_id
        self._route = route
        self._write = write
        self._began_s = time.monotonic()
        self._tenant = ""
        self._key_id = ""
        self._num_calls = 0
        self._usage: UsageRecord | None = None
        self._response: tuple[int, str, str] | None = None

    def made_by(self, principal: Principal) -> None:
        """Whoever it is has proved that; what they may do is another matter."""
        self._tenant, self._key_id = shown(principal.tenant), shown(principal.key_id)

    def call_begins(self) -> None:
        self._num_calls += 1

    def call_ended(self, usage: UsageRecord) -> None:
        self._num_calls -= 1
        self._usage = usage
        self._write_if_over()

    def responded(self, status: int, outcome: str, trace_id: str = "") -> None:
        """Said once; what is said later does not count."""
        if self._response is None:
            self._response = status, outcome, trace_id
            self._write_if_over()

    def _write_if_over(self) -> None:
        if self._write is None or self._response is None or self._num_calls:
            return
        status, outcome, trace_id = self._response
        used = self._usage
        if used is not None and used.status >= 400:
            # The status of a stream is sent before anybody knows how it ends.
            status, outcome = used.status, used.outcome
        self._write(
            AuditRecord(
                time_unix_s=time.time(),
                request_id=self._request_id,
                tenant=self._tenant,
                key_id=self._key_id,
                route=self._route,
                status=status,
                outcome=outcome,
                duration_s=time.monotonic() - self._began_s,
                call_id=None if used is None else used.request_id,
                model=None if used is None else used.model,
                num_prompt_tokens=None if used is None else used.num_prompt_tokens,
                num_cached_tokens=None if used is None else used.num_cached_tokens,
                num_completion_tokens=None if used is None else used.num_completion_tokens,
                trace_id=trace_id or ("" if used is None else used.trace_id),
            )
        )


_current: ContextVar[Audited | None] = ContextVar("remuda_audited", default=None)


def current_audited() -> Audited:
    """The request that the running task serves; tasks inherit it. One that nobody writes down where there is none."""
    return _current.get() or Audited()


class AuditLog:
    """Args:
    path: the file; None: there is no log.
    lost: called for each line that cannot be written.

    Raises:
        InvalidOption: the file cannot be written.
    """

    def __init__(self, path: Path | None = None, lost: Callable[[], None] = lambda: None) -> None:
        self._lines = None if path is None else LineLog(path, lost)

    @contextlib.contextmanager
    def request(self, request_id: str, route: str) -> Iterator[Audited]:
        """What runs inside serves this request. The gates of HTTP and gRPC enter it once for each that has to be
        authorised. One that leaves it without a response has lost its client.
        """
        audited = Audited(shown(request_id), shown(route), None if self._lines is None else self._lines.write)
        token = _current.set(audited)
        try:
            yield audited
        finally:
            _current.reset(token)
            audited.responded(*CLIENT_LEFT)

    def close(self) -> None:
        """When all lines are written."""
        if self._lines is not None:
            self._lines.close()


NO_AUDIT: Final = AuditLog()
"""For what nobody has to be authorised for."""
