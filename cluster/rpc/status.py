"""The error tree on the wire, both ways.

A gRPC status carries the message; its trailing metadata carries what the status code alone cannot:

    remuda-error-kind     the class in the error tree
    remuda-error-code     the OpenAI error code
    remuda-error-param    the bad field, percent-encoded (metadata is ASCII)
    remuda-retry-after-s  seconds; also as google.rpc.RetryInfo in grpc-status-details-bin

The same fields travel in a StreamFinish, so that one request of a multiplexed stream can fail alone.
"""

import asyncio
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn, cast
from urllib.parse import quote, unquote

import grpc
from google.rpc import error_details_pb2, status_pb2

from cluster.errors import (
    ERROR_TABLE,
    Cancelled,
    DeadlineExceeded,
    ModelNotFound,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
    mapping_of,
)
from engine.errors import EngineFailure, InvalidRequest, Overloaded, RemudaError

KIND_KEY = "remuda-error-kind"
CODE_KEY = "remuda-error-code"
PARAM_KEY = "remuda-error-param"
RETRY_AFTER_KEY = "remuda-retry-after-s"
DETAILS_KEY = "grpc-status-details-bin"

MAX_MESSAGE_CHARS = 2_000
"""Longer messages are cut, over HTTP too."""
_MAX_HEADER_BYTES = 4 << 10
"""A status travels in HTTP/2 headers, which are bounded to 8 KiB by default, percent-encoded."""
_MAX_PARAM_CHARS = 80
_PLAIN = frozenset(map(chr, range(0x20, 0x7F))) - {"%"}
"""What gRPC's percent-encoding leaves as one byte."""
_PATH = re.compile(r"(?<![^\s'\"(=\[])/(?:[^\s/'\"(),:;\]]+/)+[^\s'\"(),:;\]]*")
"""An absolute one, of two parts or more."""
_ABORT_WAIT_S = 3.0

_CLASS_BY_NAME = {kind.__name__: kind for kind in ERROR_TABLE}


@dataclass(frozen=True)
class ErrorFields:
    """What the wire says of one error."""

    kind: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None


def fields_of(error: BaseException) -> ErrorFields:
    """Not of our tree is a defect of ours: its text stays in the log, for it may hold what is not the caller's."""
    if not isinstance(error, RemudaError):
        return ErrorFields(kind=EngineFailure.__name__, message="internal error; the server's log has the details")
    param = error.param[:_MAX_PARAM_CHARS] if isinstance(error, InvalidRequest) and error.param is not None else None
    retry_after_s = error.retry_after_s if isinstance(error, Overloaded | Unavailable) else None
    # A class that only one module knows (NoReplica) travels as the nearest one of the table, which all know.
    kind = next(kind for kind in type(error).__mro__ if kind in ERROR_TABLE)
    return ErrorFields(kind.__name__, fitting(_told(error)), param, retry_after_s)


def _told(error: RemudaError) -> str:
    """What others may read. A fault of ours may quote an exception with a trace, or a path of this host: those stay
    in the log."""
    text = str(error)
    return text if mapping_of(error).http_status < 500 else _PATH.sub("(a file)", text.partition("\n")[0])


def fitting(message: str) -> str:
    """The message's beginning, as much as every client's bound on headers lets through."""
    message = message[:MAX_MESSAGE_CHARS]
    num_bytes = 0
    for index, char in enumerate(message):
        num_bytes += 1 if char in _PLAIN else 3 * len(char.encode("utf-8", "surrogatepass"))
        if num_bytes > _MAX_HEADER_BYTES:
            return message[:index]
    return message


def error_of(fields: ErrorFields) -> RemudaError:
    """The error that the other side meant. A class that this version does not know becomes an EngineFailure."""
    kind = _CLASS_BY_NAME.get(fields.kind, EngineFailure)
    if issubclass(kind, InvalidRequest):
        return kind(fields.message, fields.param)
    if issubclass(kind, Overloaded | Unavailable) and fields.retry_after_s is not None:
        return kind(fields.message, fields.retry_after_s)
    return kind(fields.message)


def trailing_metadata(error: BaseException) -> tuple[tuple[str, str | bytes], ...]:
    fields = fields_of(error)
    pairs: list[tuple[str, str | bytes]] = [(KIND_KEY, fields.kind), (CODE_KEY, mapping_of(error).code)]
    if fields.param is not None:
        pairs.append((PARAM_KEY, quote(fields.param)))
    if fields.retry_after_s is not None:
        pairs.append((RETRY_AFTER_KEY, f"{fields.retry_after_s:g}"))
        pairs.append((DETAILS_KEY, _retry_details(error, fields.message, fields.retry_after_s)))
    return tuple(pairs)


def _retry_details(error: BaseException, message: str, retry_after_s: float) -> bytes:
    """As clients of other languages find it. Its message is short: all of it has to fit into HTTP/2's headers."""
    status = status_pb2.Status(code=mapping_of(error).grpc_status.value[0], message=message[:_MAX_PARAM_CHARS])
    info = error_details_pb2.RetryInfo()
    info.retry_delay.FromNanoseconds(round(retry_after_s * 1e9))
    status.details.add().Pack(info)
    return bytes(status.SerializeToString())


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: BaseException) -> NoReturn:
    """Ends the call with the error's status. Raises, as gRPC's own abort does; nothing after it runs.

    A client that does not read has its status wait in gRPC, behind the messages; that is not waited for.
    """
    fields = fields_of(error)
    try:
        async with asyncio.timeout(_ABORT_WAIT_S):
            await context.abort(mapping_of(error).grpc_status, fields.message, trailing_metadata(error))
    except TimeoutError:
        raise asyncio.CancelledError from None
    raise AssertionError("gRPC's abort returned")


_CLASS_BY_STATUS: dict[grpc.StatusCode, type[RemudaError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: ModelNotFound,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
}


def error_from_rpc(error: grpc.RpcError) -> RemudaError:
    """The error tree's view of a failed call: by the metadata, else (gRPC itself failed it) by the status code.

    Takes what calls of grpc and of grpc.aio raise.
    """
    pairs = cast(Iterable[tuple[str, str | bytes]], error.trailing_metadata() or ())
    metadata = {key: value for key, value in pairs if isinstance(value, str)}
    message = error.details() or error.code().name
    kind = metadata.get(KIND_KEY)
    if kind is None:
        kind = _CLASS_BY_STATUS.get(error.code(), EngineFailure).__name__
    param = metadata.get(PARAM_KEY)
    retry_after_s = metadata.get(RETRY_AFTER_KEY)
    return error_of(
        ErrorFields(
            kind=kind,
            message=message,
            param=None if param is None else unquote(param),
            retry_after_s=None if retry_after_s is None else float(retry_after_s),
        )
    )
