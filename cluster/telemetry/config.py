"""Where traces go. Everything else (headers, certificates, sampler, resource attributes) is OpenTelemetry's own
environment variables, which its SDK reads."""

import os
from collections.abc import Mapping
from urllib.parse import urlsplit

from engine.errors import InvalidOption

_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


def otlp_endpoint(option: str | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """``--otlp-endpoint``, or else what OpenTelemetry's variables say; None: nothing is traced.

    Raises:
        InvalidOption: it is no URL with scheme, host and port.
    """
    name, value = "--otlp-endpoint", option
    for variable in _VARIABLES:
        if value is None:
            name, value = variable, environment.get(variable)
    if not value or environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    try:
        parts = urlsplit(value)
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port is not None
    except ValueError:
        is_good = False
    if not is_good:
        raise InvalidOption(
            f"{name} {value}: write http://HOST:PORT, or https:// for TLS, of a collector that takes OTLP over gRPC "
            "(its port is 4317)"
        )
    return value
