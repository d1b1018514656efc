"""The id of the HTTP request or gRPC call that the running task serves, for the log."""

import contextlib
import re
import uuid
from collections.abc import Iterable, Iterator
from contextvars import ContextVar

_HEADER = "x-request-id"
_SAFE = re.compile(r"[\x21-\x7e]{1,128}")
_current: ContextVar[str] = ContextVar("remuda_request_id", default="")


def current_request_id() -> str:
    """Empty outside of any; tasks inherit it from who created them."""
    return _current.get()


@contextlib.contextmanager
def handling(request_id: str) -> Iterator[None]:
    """What runs inside is done for this request. The gates of HTTP and gRPC enter it once per request."""
    token = _current.set(request_id)
    try:
        yield
    finally:
        _current.reset(token)


def request_id_of(headers: Iterable[tuple[str, str]]) -> str:
    """The client's, where it can stand in a header and a log as it is; else a new one. Names are in lower case."""
    given = next((value for name, value in headers if name == _HEADER), "")
    return given if _SAFE.fullmatch(given) else uuid.uuid4().hex
