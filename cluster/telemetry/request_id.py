"""The id of the HTTP request or gRPC call that the running task serves, for the log."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

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
