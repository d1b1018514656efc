"""Tracers: one that sends to an OpenTelemetry collector, and one that does nothing at next to no cost."""

import logging
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from opentelemetry.trace import NoOpTracerProvider, Tracer

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

_BATCH_DELAY_MS = 1000.0
_MAX_BATCH = 128
"""Spans that are encoded at once: some 5 ms of the interpreter, which a leader's engine needs too."""
_MAX_WAITING = 4096
"""Beyond it spans are dropped: a collector that is away costs bounded memory and no request."""
_CLOSE_S = 3.0

NO_TRACER: Final[Tracer] = NoOpTracerProvider().get_tracer("remuda")
"""Its spans record nothing, and hand on whose children they are."""


@dataclass(frozen=True)
class Telemetry:
    """Where one process sends its spans. ``tracer`` makes them, from any thread."""

    tracer: Tracer = NO_TRACER
    _sender: "tuple[TracerProvider, SpanExporter] | None" = field(default=None, repr=False)

    def close(self) -> None:
        """Sends what waits, as far as the collector takes it within 3 s."""
        if self._sender is None:
            return
        provider, exporter = self._sender
        last = threading.Thread(target=provider.shutdown, name="last spans", daemon=True)
        last.start()
        last.join(_CLOSE_S)
        if last.is_alive():
            # Else it goes on trying a collector that is away.
            exporter.shutdown()
            last.join(_CLOSE_S)


def open_telemetry(endpoint: str | None, service: str, instance: str) -> Telemetry:
    """Spans of this process go to a collector (OTLP over gRPC); nowhere, where ``endpoint`` is None.

    ``service`` and ``instance`` name the process; OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win over them.
    """
    if endpoint is None:
        return Telemetry()
    # Only where somebody traces: the SDK takes a fifth of a second to import.
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    # It would tell of each of its attempts; that it gave up is enough.
    logging.getLogger("opentelemetry.exporter").setLevel(logging.ERROR)
    named = Resource({"service.name": service, "service.namespace": "remuda", "service.instance.id": instance})
    provider = TracerProvider(resource=named.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint, insecure=endpoint.startswith("http://"))
    provider.add_span_processor(
        BatchSpanProcessor(
            exporter,
            max_queue_size=_MAX_WAITING,
            schedule_delay_millis=_BATCH_DELAY_MS,
            max_export_batch_size=_MAX_BATCH,
        )
    )
    return Telemetry(provider.get_tracer("remuda"), (provider, exporter))
