"""The shape of Anthropic's errors. Pure."""

from collections.abc import Mapping
from typing import Any

_TYPE_BY_STATUS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def anthropic_error(status: int, error: Mapping[str, Any]) -> dict[str, Any]:
    """``error`` is OpenAI's object. ``param`` and ``code`` are additions: the field and our own finer name."""
    kind = _TYPE_BY_STATUS.get(status, "api_error")
    inner = {"type": kind, "message": error["message"], "param": error["param"], "code": error["code"]}
    return {"type": "error", "error": inner}
