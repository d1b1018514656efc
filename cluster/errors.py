"""The serving side's part of the error tree (its root and the engine's part: engine/errors.py), and the one table that
maps every class to an exit code, an HTTP status, an OpenAI error type and code, and a gRPC status.

    RemudaError
    ├── …                         see engine.errors
    └── ServingError
        ├── ModelNotFound         the request names a model that is not served here
        ├── Unauthenticated       no credentials, or wrong ones
        ├── PermissionDenied      good credentials that do not reach so far
        ├── PayloadTooLarge       a request body over the bound
        ├── DeadlineExceeded      a per-request, queue or first-token deadline passed
        ├── Cancelled             the client went away
        ├── UnknownStream         a request that a client or front end wants to go on with, and that nobody has
        ├── Unavailable           nobody can serve now: starting, draining, or all replicas lost
        │   ├── Draining
        │   └── ConnectionLost    between front end and leader; what ran over it may still run
        ├── StartFailed           the cluster could not be started
        └── SelfTestFailed        a replica does not compute what it should
"""

from dataclasses import dataclass

import grpc

from engine import errors as engine_errors
from engine.errors import RemudaError


class ServingError(RemudaError):
    """Base of the serving side's errors."""


class ModelNotFound(ServingError):
    """The request names a model that is not served here."""


class Unauthenticated(ServingError):
    """No credentials, or wrong ones."""


class PermissionDenied(ServingError):
    """Good credentials that do not reach so far."""


class PayloadTooLarge(ServingError):
    """A request body over the bound."""


class DeadlineExceeded(ServingError):
    """A per-request, queue or first-token deadline passed."""


class Cancelled(ServingError):
    """The client went away."""


class Unavailable(ServingError):
    """Nobody can serve now.

    Args:
        message: why.
        retry_after_s: seconds after which a new try is reasonable.
    """

    def __init__(self, message: str, retry_after_s: float = 5.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Draining(Unavailable):
    """The server finishes what it has and takes no more."""


class ConnectionLost(Unavailable):
    """The connection between a front end and a leader broke. The leader may live, and go on with what it has."""


class UnknownStream(ServingError):
    """A request that somebody wants to go on with, and that nobody has (any more)."""


class TakenOver(ServingError):
    """Another connection goes on reading the request, which runs on."""


class StartFailed(ServingError):
    """The cluster could not be started."""


class SelfTestFailed(ServingError):
    """A replica does not compute what it should, so it must not serve."""


@dataclass(frozen=True)
class ErrorMapping:
    """How one error class appears in each world. ``code`` is the OpenAI error code, ``type`` its error type."""

    exit_code: int
    http_status: int
    type: str
    code: str
    grpc_status: grpc.StatusCode


_BAD_INPUT = "invalid_request_error"
_SERVER = "server_error"

ERROR_TABLE: dict[type[RemudaError], ErrorMapping] = {
    engine_errors.InvalidOption: ErrorMapping(2, 400, _BAD_INPUT, "invalid_option", grpc.StatusCode.INVALID_ARGUMENT),
    engine_errors.LayoutError: ErrorMapping(2, 400, _BAD_INPUT, "invalid_layout", grpc.StatusCode.INVALID_ARGUMENT),
    engine_errors.CheckpointError: ErrorMapping(
        2, 500, _SERVER, "invalid_checkpoint", grpc.StatusCode.FAILED_PRECONDITION
    ),
    engine_errors.AdapterError: ErrorMapping(
        2, 400, _BAD_INPUT, "invalid_adapter", grpc.StatusCode.FAILED_PRECONDITION
    ),
    engine_errors.ContextLengthExceeded: ErrorMapping(
        2, 400, _BAD_INPUT, "context_length_exceeded", grpc.StatusCode.INVALID_ARGUMENT
    ),
    engine_errors.InvalidRequest: ErrorMapping(2, 400, _BAD_INPUT, "invalid_value", grpc.StatusCode.INVALID_ARGUMENT),
    engine_errors.InvalidInput: ErrorMapping(2, 400, _BAD_INPUT, "invalid_input", grpc.StatusCode.INVALID_ARGUMENT),
    engine_errors.DoesNotFit: ErrorMapping(2, 500, _SERVER, "does_not_fit", grpc.StatusCode.FAILED_PRECONDITION),
    engine_errors.Overloaded: ErrorMapping(
        1, 429, "rate_limit_error", "rate_limit_exceeded", grpc.StatusCode.RESOURCE_EXHAUSTED
    ),
    engine_errors.ProtocolViolation: ErrorMapping(1, 500, _SERVER, "internal_error", grpc.StatusCode.INTERNAL),
    engine_errors.RankFailure: ErrorMapping(1, 500, _SERVER, "rank_failure", grpc.StatusCode.INTERNAL),
    engine_errors.RequestFailure: ErrorMapping(1, 500, _SERVER, "request_failure", grpc.StatusCode.INTERNAL),
    engine_errors.EngineFailure: ErrorMapping(1, 500, _SERVER, "engine_failure", grpc.StatusCode.INTERNAL),
    ModelNotFound: ErrorMapping(2, 404, _BAD_INPUT, "model_not_found", grpc.StatusCode.NOT_FOUND),
    Unauthenticated: ErrorMapping(1, 401, "authentication_error", "invalid_api_key", grpc.StatusCode.UNAUTHENTICATED),
    PermissionDenied: ErrorMapping(1, 403, "permission_error", "permission_denied", grpc.StatusCode.PERMISSION_DENIED),
    PayloadTooLarge: ErrorMapping(2, 413, _BAD_INPUT, "payload_too_large", grpc.StatusCode.RESOURCE_EXHAUSTED),
    DeadlineExceeded: ErrorMapping(1, 504, "timeout_error", "deadline_exceeded", grpc.StatusCode.DEADLINE_EXCEEDED),
    Cancelled: ErrorMapping(1, 499, _BAD_INPUT, "cancelled", grpc.StatusCode.CANCELLED),
    Draining: ErrorMapping(1, 503, _SERVER, "draining", grpc.StatusCode.UNAVAILABLE),
    ConnectionLost: ErrorMapping(1, 503, _SERVER, "unavailable", grpc.StatusCode.UNAVAILABLE),
    UnknownStream: ErrorMapping(1, 404, _BAD_INPUT, "request_not_found", grpc.StatusCode.NOT_FOUND),
    TakenOver: ErrorMapping(1, 409, _BAD_INPUT, "taken_over", grpc.StatusCode.ABORTED),
    Unavailable: ErrorMapping(1, 503, _SERVER, "unavailable", grpc.StatusCode.UNAVAILABLE),
    StartFailed: ErrorMapping(1, 500, _SERVER, "start_failed", grpc.StatusCode.INTERNAL),
    SelfTestFailed: ErrorMapping(1, 500, _SERVER, "self_test_failed", grpc.StatusCode.INTERNAL),
    ServingError: ErrorMapping(1, 500, _SERVER, "internal_error", grpc.StatusCode.INTERNAL),
    RemudaError: ErrorMapping(1, 500, _SERVER, "internal_error", grpc.StatusCode.INTERNAL),
}


def mapping_of(error: BaseException | type[BaseException]) -> ErrorMapping:
    """The mapping of the error's nearest class in the table; of RemudaError for anything that is not ours."""
    kind = error if isinstance(error, type) else type(error)
    for base in kind.__mro__:
        if base in ERROR_TABLE:
            return ERROR_TABLE[base]
    return ERROR_TABLE[RemudaError]
