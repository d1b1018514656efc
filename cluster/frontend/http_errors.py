"""Errors as each API's clients expect them: one tree, several shapes."""

import logging
import math
from collections.abc import Callable
from typing import Any

import msgspec
from starlette.responses import Response

from cluster.errors import Unauthenticated, Unavailable, mapping_of
from cluster.frontend.anthropic.errors import anthropic_error
from cluster.frontend.ollama.errors import ollama_error
from cluster.rpc.status import MAX_MESSAGE_CHARS, fields_of
from engine.errors import Overloaded, RemudaError, RequestFailure

_log = logging.getLogger(__name__)


class JsonResponse(Response):
    """A body that msgspec encodes: several times as fast as the standard library's."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)


def error_object(error: BaseException) -> dict[str, Any]:
    """``{"message", "type", "param", "code"}``. What is not of our tree is a defect: only the log has its text."""
    mapping = mapping_of(error)
    fields = fields_of(error)
    return {"message": fields.message, "type": mapping.type, "param": fields.param, "code": mapping.code}


def log_defect(error: BaseException) -> None:
    """Errors that no caller can cause belong in the log."""
    if not isinstance(error, RemudaError):
        _log.error("a request failed in our own code", exc_info=error)
    elif mapping_of(error).http_status == 500:
        _log.error("a request failed: %s: %s", type(error).__name__, error)


_SHAPES: dict[str, Callable[[int, dict[str, Any]], dict[str, Any]]] = {
    "/api/": ollama_error,
    "/v1/messages": anthropic_error,
}
"""By the beginning of the path; OpenAI's elsewhere."""


def _body(path: str, status: int, error: dict[str, Any]) -> dict[str, Any]:
    shape = next((shape for prefix, shape in _SHAPES.items() if path.startswith(prefix)), None)
    return {"error": error} if shape is None else shape(status, error)


def error_response(error: BaseException, path: str) -> Response:
    """In the shape of the API that has this path."""
    headers: dict[str, str] = {}
    if isinstance(error, Overloaded | Unavailable):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, RequestFailure):
        headers["x-should-retry"] = "false"  # OpenAI's and Anthropic's clients would send it two times more
    if isinstance(error, Unauthenticated):
        headers["www-authenticate"] = "Bearer"
    status = mapping_of(error).http_status
    return JsonResponse(_body(path, status, error_object(error)), status, headers)


def plain_error(
    status: int, message: str, code: str, headers: dict[str, str] | None = None, path: str = ""
) -> Response:
    """For what HTTP itself refuses: unknown paths and methods."""
    error = {"message": message[:MAX_MESSAGE_CHARS], "type": "invalid_request_error", "param": None, "code": code}
    return JsonResponse(_body(path, status, error), status, headers)
