"""A trace as it comes from a client or a gateway, and as it goes to a leader: W3C trace context."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Final

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanContext, SpanKind, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_HEADERS: Final = frozenset({"traceparent", "tracestate"})
_PROPAGATOR: Final = TraceContextTextMapPropagator()
_NO_CONTEXT: Final = Context()


def context_of(headers: Iterable[tuple[str, str]]) -> Context:
    """What HTTP headers or gRPC metadata (names in lower case) say; where they say nothing usable, a new trace."""
    carrier = {name: value for name, value in headers if name in _HEADERS}
    return _PROPAGATOR.extract(carrier, _NO_CONTEXT) if carrier else _NO_CONTEXT


def context_of_header(traceparent: str) -> Context:
    """As ``header_of`` wrote it, or empty."""
    return _PROPAGATOR.extract({"traceparent": traceparent}, _NO_CONTEXT) if traceparent else _NO_CONTEXT


def header_of(span: Span) -> str:
    """``traceparent`` for the children of ``span``; empty where nobody keeps them."""
    found = span.get_span_context()
    if not (found.is_valid and found.trace_flags.sampled):
        return ""
    return f"00-{found.trace_id:032x}-{found.span_id:016x}-{found.trace_flags:02x}"


def trace_id_of(span: Span) -> str:
    """32 hexadecimal digits; empty where there is no trace."""
    found = span.get_span_context()
    return f"{found.trace_id:032x}" if found.is_valid else ""


def span_context_of(traceparent: str) -> SpanContext | None:
    """To link to."""
    found = trace.get_current_span(context_of_header(traceparent)).get_span_context()
    return found if found.is_valid else None


def current_context() -> Context:
    """Of the HTTP request or gRPC call that the running task serves."""
    return otel_context.get_current()


@contextlib.contextmanager
def serving(tracer: Tracer, name: str, parent: Context) -> Iterator[Span]:
    """The span of one HTTP request or gRPC call; what runs inside, and tasks that it creates, find it with
    ``current_context``."""
    span = tracer.start_span(name, parent, SpanKind.SERVER)
    token = otel_context.attach(trace.set_span_in_context(span, parent))
    try:
        yield span
    finally:
        otel_context.detach(token)
        span.end()
