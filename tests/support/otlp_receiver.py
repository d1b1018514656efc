"""A collector: takes OTLP over gRPC with OpenTelemetry's own stubs, and keeps the spans for whoever asks."""

import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1 import trace_pb2

WAIT_S = 15.0


@dataclass(frozen=True)
class ReceivedSpan:
    """As it came. ``parent`` is empty at a root. ``links``: ids of spans."""

    name: str
    service: str
    trace_id: str
    span_id: str
    parent: str
    kind: str
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    events: list[tuple[str, dict[str, Any]]]
    links: list[tuple[str, str]]
    """(Trace id, span id)."""
    is_error: bool

    @property
    def seconds(self) -> float:
        return (self.end_ns - self.start_ns) / 1e9


class OtlpReceiver(trace_service_pb2_grpc.TraceServiceServicer):
    """A context manager; listens on a free port of 127.0.0.1. ``credentials``: for TLS."""

    def __init__(self, credentials: grpc.ServerCredentials | None = None) -> None:
        self._changed = threading.Condition()
        self._spans: list[ReceivedSpan] = []
        self._server = grpc.server(ThreadPoolExecutor(4))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        if credentials is None:
            self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        else:
            self.endpoint = f"https://127.0.0.1:{self._server.add_secure_port('127.0.0.1:0', credentials)}"

    def Export(self, request: Any, context: Any) -> Any:
        with self._changed:
            for resource in request.resource_spans:
                service = _values(resource.resource.attributes)["service.name"]
                self._spans += [_received(span, service) for scope in resource.scope_spans for span in scope.spans]
            self._changed.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def trace(self, trace_id: str, names: Iterable[str], services: Iterable[str] = ()) -> list[ReceivedSpan]:
        """All spans of one trace, as soon as it has one of each of ``names`` (as often as they are given), and one of
        each of ``services``."""
        wanted, of_services = sorted(names), set(services)
        end_s = time.monotonic() + WAIT_S
        with self._changed:
            while True:
                found = [span for span in self._spans if span.trace_id == trace_id]
                missing = list(wanted)
                for span in found:
                    if span.name in missing:
                        missing.remove(span.name)
                missing += of_services - {span.service for span in found}
                if not missing:
                    return found
                have = sorted(span.name for span in found)
                assert self._changed.wait(end_s - time.monotonic()), f"no span {missing} came within {WAIT_S} s: {have}"

    @property
    def num_spans(self) -> int:
        return len(self._spans)

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.stop(None).wait()


def tree(spans: Iterable[ReceivedSpan]) -> dict[str, str]:
    """Name of each span → that of its parent, empty where that is not among them. Names must differ."""
    by_id = {span.span_id: span for span in spans}
    names = {span.name: by_id[span.parent].name if span.parent in by_id else "" for span in by_id.values()}
    assert len(names) == len(by_id), sorted(span.name for span in by_id.values())
    return names


def _received(span: trace_pb2.Span, service: str) -> ReceivedSpan:
    return ReceivedSpan(
        name=span.name,
        service=service,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent=span.parent_span_id.hex(),
        kind=trace_pb2.Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        attributes=_values(span.attributes),
        events=[(event.name, _values(event.attributes)) for event in span.events],
        links=[(link.trace_id.hex(), link.span_id.hex()) for link in span.links],
        is_error=span.status.code == trace_pb2.Status.STATUS_CODE_ERROR,
    )


def _values(attributes: Iterable[KeyValue]) -> dict[str, Any]:
    return {attribute.key: _value(attribute.value) for attribute in attributes}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return None if kind is None else getattr(value, kind)
