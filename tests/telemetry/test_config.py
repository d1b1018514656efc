"""Where traces go: the option, OpenTelemetry's own variables, and nowhere."""

import pytest

from cluster.telemetry.config import otlp_endpoint
from cluster.telemetry.tracing import NO_TRACER, open_telemetry
from engine.errors import InvalidOption

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
