"""The spans of one sequence's way to a replica: choosing one, having it compute, and beginning again elsewhere."""

from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode, Tracer

from cluster.telemetry import names
from cluster.telemetry.propagation import context_of_header, header_of
from engine.errors import RemudaError


class Attempts:
    """One at a time: ``routing``, ``sent``, then ``lost`` or ``close``. Each attempt links to the one before, so that a
    trace shows what a lost replica had given.

    Args:
        tracer: makes the spans.
        header: ``traceparent`` of the call; where it is empty nothing is done.
    """

    def __init__(self, tracer: Tracer, header: str) -> None:
        self._tracer = tracer if header else None
        self._parent = context_of_header(header)
        self._route: Span | None = None
        self._attempt: Span | None = None
        self._before: Span | None = None
        self._num_attempts = 0

    def routing(self) -> None:
        """A replica is looked for, or waited for."""
        if self._tracer is not None and self._route is None:
            self._route = self._tracer.start_span(names.ROUTE, self._parent)

    def sent(self, replica: str, request_id: str, num_tokens: int) -> str:
        """It goes to ``replica`` with ``num_tokens`` generated already. Returns ``traceparent`` for the leader."""
        if self._tracer is None:
            return ""
        self._end_route()
        links = [] if self._before is None else [Link(self._before.get_span_context())]
        attributes: dict[str, str | int] = {
            names.REPLICA: replica,
            names.REQUEST_ID: request_id,
            names.ATTEMPT: self._num_attempts,
            names.NUM_TOKENS_BEFORE: num_tokens,
        }
        self._num_attempts += 1
        self._attempt = self._tracer.start_span(
            f"{names.ATTEMPT_SPAN} {replica}", self._parent, SpanKind.CLIENT, attributes, links
        )
        return header_of(self._attempt)

    def lost(self, error: RemudaError, num_tokens: int) -> None:
        """The replica, or the way to it, is lost after so many tokens in all."""
        if (span := self._attempt) is not None:
            kind = type(error).__name__
            span.add_event(names.LOST, {names.ERROR_TYPE: kind, names.NUM_TOKENS: num_tokens, "message": str(error)})
            span.set_status(Status(StatusCode.ERROR, kind))
            self._before = span
            self._end_attempt(num_tokens)

    def close(self, num_tokens: int) -> None:
        """Nothing more comes, or nobody waits for it."""
        self._end_route()
        self._end_attempt(num_tokens)

    def _end_route(self) -> None:
        route, self._route = self._route, None
        if route is not None:
            route.end()

    def _end_attempt(self, num_tokens: int) -> None:
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            attempt.set_attribute(names.NUM_TOKENS, num_tokens)
            attempt.end()
