"""Where traces go: the option, OpenTelemetry's own variables, and nowhere."""

import socket
import threading
import time
from pathlib import Path

import grpc
import pytest

from cluster.telemetry.config import otlp_endpoint
from cluster.telemetry.propagation import context_of
from cluster.telemetry.tracing import NO_TRACER, open_telemetry
from engine.errors import InvalidOption
from tests.identity.authority import Authority, write_pair
from tests.support.otlp_receiver import OtlpReceiver

STANDARD = "OTEL_EXPORTER_OTLP_ENDPOINT"


@pytest.mark.parametrize(
    ("option", "environment", "expected"),
    [
        (None, {}, None),
        ("http://c:4317", {}, "http://c:4317"),
        (None, {STANDARD: "https://c:4317"}, "https://c:4317"),
        ("http://c:4317", {STANDARD: "http://other:4317"}, "http://c:4317"),
        (None, {STANDARD: "http://c:1", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://t:2"}, "http://t:2"),
        (None, {STANDARD: ""}, None),
        ("http://c:4317", {"OTEL_SDK_DISABLED": "true"}, None),
    ],
)
def test_who_says_where(option: str | None, environment: dict[str, str], expected: str | None) -> None:
    assert otlp_endpoint(option, environment) == expected


@pytest.mark.parametrize("value", ["collector:4317", "http://collector", "grpc://c:4317", "http://c:port", "http://:1"])
def test_what_is_no_address_is_refused_by_name(value: str) -> None:
    with pytest.raises(InvalidOption, match="--otlp-endpoint .*: write http://HOST:PORT"):
        otlp_endpoint(value, {})
    with pytest.raises(InvalidOption, match=f"{STANDARD} .*: write http://HOST:PORT"):
        otlp_endpoint(None, {STANDARD: value})


def test_nowhere_costs_nothing_to_speak_of() -> None:
    telemetry = open_telemetry(None, "remuda-frontend", "one")
    assert telemetry.tracer is NO_TRACER and not telemetry.tracer.start_span("x").is_recording()
    telemetry.close()


def test_a_collector_is_known_by_its_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what else OpenTelemetry's variables say holds too."""
    authority = Authority("collectors")
    write_pair(tmp_path, "collector", authority.issue_for_host())
    (tmp_path / "ca.crt").write_bytes(authority.pem)
    pair = (tmp_path / "collector.key").read_bytes(), (tmp_path / "collector.crt").read_bytes()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_CERTIFICATE", str(tmp_path / "ca.crt"))
    monkeypatch.setenv("OTEL_SERVICE_NAME", "llm")
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    with OtlpReceiver(grpc.ssl_server_credentials([pair])) as receiver:
        telemetry = open_telemetry(receiver.endpoint, "remuda-frontend", "one")
        parent = context_of([("traceparent", f"00-{trace_id}-b7ad6b7169203331-01")])
        telemetry.tracer.start_span("x", parent).end()
        telemetry.close()
        (span,) = receiver.trace(trace_id, ["x"])
    assert span.service == "llm"


def test_a_collector_that_is_away_holds_up_nobody() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        away = f"http://127.0.0.1:{taken.getsockname()[1]}"
        telemetry = open_telemetry(away, "remuda-frontend", "one")
        began_s = time.monotonic()
        for _ in range(5000):  # more than may wait
            telemetry.tracer.start_span("x").end()
        assert time.monotonic() - began_s < 5
        telemetry.close()
        assert time.monotonic() - began_s < 10
        # And goes on trying nowhere: its thread has ended.
        assert not {"last spans", "OtelBatchSpanRecordProcessor"} & {thread.name for thread in threading.enumerate()}
