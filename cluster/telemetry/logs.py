"""The log as lines of JSON, each with the request and the trace that it belongs to."""

import io
import logging
from typing import TYPE_CHECKING, Any, TextIO

from opentelemetry import trace

from cluster.telemetry.propagation import trace_id_of
from cluster.telemetry.request_id import current_request_id

if TYPE_CHECKING:
    from structlog.typing import EventDict

_OWN = ("cluster", "engine")
"""Of others' libraries only warnings are shown."""


class LogLines(io.TextIOBase):
    """A text stream whose lines become events of the log: for what is otherwise written for a person."""

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__()
        self._logger = logger
        self._begun = ""

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            if line.strip():
                self._logger.info(line.strip())
        return len(text)


def log_as_json(service: str, stream: TextIO | None = None) -> None:
    """From now on everything that this process logs, its own at level INFO, is a JSON object a line, on ``stream``
    (None: standard error).

    ``service``: the process, by the name that its spans have. Fields: ``timestamp`` (ISO 8601, UTC), ``level``,
    ``logger``, ``event``, ``service``; where there are such, ``request_id``, ``trace_id``, ``span_id``, ``exception``,
    and what ``extra`` of the call gave.
    """
    # Only where it is asked for.
    import structlog

    def with_identity(logger: Any, method: str, event: "EventDict") -> "EventDict":
        event["service"] = service
        if (request_id := current_request_id()) and "request_id" not in event:
            event["request_id"] = request_id
        span = trace.get_current_span()
        if trace_id := trace_id_of(span):
            event.setdefault("trace_id", trace_id)
            event.setdefault("span_id", f"{span.get_span_context().span_id:016x}")
        return event

    shared: list[Any] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        with_identity,
    ]
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    for name in _OWN:
        logging.getLogger(name).setLevel(logging.INFO)
