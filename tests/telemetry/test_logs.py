"""The log as JSON: which request and trace a line belongs to, and that nothing else is on the stream."""

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider

from cluster.cli.console import open_console
from cluster.telemetry.logs import log_as_json
from cluster.telemetry.propagation import context_of, serving
from cluster.telemetry.request_id import handling
from engine.errors import InvalidOption
from tests.frontend.scripted import says
from tests.frontend.servers import served

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE_ID}-b7ad6b7169203331-01"


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """What a process logs as JSON."""
    root, own = logging.getLogger(), [logging.getLogger(name) for name in ("cluster", "engine")]
    handlers, levels = root.handlers[:], [logger.level for logger in own]
    written = io.StringIO()
    log_as_json("remuda-frontend", written)
    yield written
    root.handlers[:] = handlers
    for logger, level in zip(own, levels, strict=True):
        logger.setLevel(level)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_names_its_request_and_trace(stream: io.StringIO) -> None:
    tracer = TracerProvider().get_tracer("test")
    log = logging.getLogger("cluster.somewhere")
    log.info("before")
    with handling("gateway-7"), serving(tracer, "POST /x", context_of([("traceparent", TRACEPARENT)])):
        log.warning("replica %s is lost", "r0", extra={"num_tokens": 3})
        try:
            raise ValueError("why")
        except ValueError:
            log.exception("failed")
    logging.getLogger("somebody.else").info("not of interest")
    before, warning, error = lines(stream)
    assert before["event"] == "before" and "request_id" not in before and "trace_id" not in before
    assert warning["event"] == "replica r0 is lost" and warning["num_tokens"] == 3
    assert (warning["level"], warning["logger"], warning["service"]) == (
        "warning",
        "cluster.somewhere",
        "remuda-frontend",
    )
    for line in (warning, error):
        assert (line["request_id"], line["trace_id"]) == ("gateway-7", TRACE_ID) and len(line["span_id"]) == 16
    assert error["exception"].startswith("Traceback") and "ValueError: why" in error["exception"]


async def test_each_call_of_the_model_ends_with_a_line(stream: io.StringIO) -> None:
    async with served(says([300, 301])) as one:
        headers = {"x-request-id": "gateway-8", "traceparent": TRACEPARENT}
        body = {"prompt": "Zora keeps a secret", "max_tokens": 2}
        await one.http.post("/v1/completions", json=body, headers=headers)
        await one.http.post("/v1/completions", json={**body, "model": "nobody's"}, headers=headers)
    done, refused = [line for line in lines(stream) if "call" in line]
    for line in (done, refused):
        assert (line["request_id"], line["trace_id"]) == ("gateway-8", TRACE_ID)
    assert (done["call"]["status"], done["call"]["num_completion_tokens"]) == (200, 2)
    assert done["call"]["trace_id"] == TRACE_ID
    assert (refused["call"]["status"], refused["call"]["outcome"]) == (404, "ModelNotFound")
    assert "Zora" not in stream.getvalue()


def test_what_is_told_to_people_is_in_the_log_too(stream: io.StringIO, capsys: pytest.CaptureFixture[str]) -> None:
    console = open_console("json", "remuda-frontend")
    console.print("m: serving [red]here[/red]\n  notice: two lines")
    told = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["event"] for line in told] == ["m: serving here", "notice: two lines"]


def test_other_forms_are_refused() -> None:
    with pytest.raises(InvalidOption, match="--log-format xml: write text or json"):
        open_console("xml", "remuda-frontend")
