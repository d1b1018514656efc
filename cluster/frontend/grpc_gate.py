"""Around every gRPC method: who calls and may it, before the first message of the call is read."""

import asyncio
import contextlib
import inspect
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, Final, TypeAlias, cast

import grpc
from google.protobuf.message import DecodeError
from opentelemetry.trace import Span, Status, StatusCode, Tracer

from cluster.errors import DeadlineExceeded
from cluster.frontend.http_errors import log_defect
from cluster.identity.authenticator import Authenticator, Credentials
from cluster.identity.principal import ADMIN, INFER, NOBODY, Principal, acting_as
from cluster.identity.principal import Scope as Permission
from cluster.rpc.status import abort
from cluster.telemetry import names
from cluster.telemetry.propagation import context_of, serving, trace_id_of
from cluster.telemetry.request_id import handling, request_id_of
from cluster.telemetry.tracing import NO_TRACER
from cluster.tenants.audit import CLIENT_LEFT, NO_AUDIT, AuditLog, current_audited
from engine.errors import InvalidRequest

MESSAGE_TIMEOUT_S = 60.0
"""A call whose one message has not come by then is ended."""

_OPEN_SERVICES = frozenset({"grpc.health.v1.Health"})
_PERMISSIONS: dict[str, Permission] = {"remuda.v1.Admin": ADMIN}
"""What a service asks for; any other one asks for INFER."""

_CODES = {code.value[0]: code for code in grpc.StatusCode}
HTTP_STATUS_OF: Final[dict[grpc.StatusCode, int]] = {
    grpc.StatusCode.OK: 200,
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.UNKNOWN: 500,
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.INTERNAL: 500,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DATA_LOSS: 500,
    grpc.StatusCode.UNAUTHENTICATED: 401,
}
"""As google.rpc.Code has them."""

Context = grpc.aio.ServicerContext[Any, Any]
_Metadata: TypeAlias = list[tuple[str, str]]
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class GrpcGate(grpc.aio.ServerInterceptor):
    """Serves every method as a stream in both directions, which is the same on the wire: so no message is taken from a
    caller who may not call, and a message that does not come costs bounded time.

    Args:
        authenticator: who is who.
        message_timeout_s: for the one message of a call that has one.
        tracer: for the spans of calls.
        audit: gets a line for each call, but those of open services.
    """

    def __init__(
        self,
        authenticator: Authenticator,
        message_timeout_s: float = MESSAGE_TIMEOUT_S,
        tracer: Tracer = NO_TRACER,
        audit: AuditLog = NO_AUDIT,
    ) -> None:
        self._tracer = tracer
        self._audit = audit
        self._authenticator = authenticator
        self._message_timeout_s = message_timeout_s

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["_Handler | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "_Handler | None":
        handler = await continuation(handler_call_details)
        if handler is None:
            return None  # gRPC answers UNIMPLEMENTED
        method = handler_call_details.method.removeprefix("/")
        service = method.rpartition("/")[0]
        behaviour = _behaviour(handler)

        async def attempt(messages: AsyncIterator[Any], context: Context, metadata: _Metadata) -> None:
            try:
                principal = await self._admitted(service, context, metadata)
                given = _readable(messages) if handler.request_streaming else await self._only(messages)
                with acting_as(principal):
                    await _answer(behaviour, given, context)
            except (grpc.aio.AbortError, grpc.aio.InternalError):
                raise
            except NotImplementedError:
                await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this server does not have this method")
            except Exception as error:  # noqa: BLE001  whatever it is, the client gets a status
                log_defect(error)
                await abort(context, error)

        async def answer(messages: AsyncIterator[Any], context: Context, metadata: _Metadata) -> None:
            # What cannot be sent any more has nobody to read it.
            async with _given_back(messages):
                with contextlib.suppress(grpc.aio.InternalError):
                    await attempt(messages, context, metadata)

        async def serve(messages: AsyncIterator[Any], context: Context) -> None:
            metadata = _pairs(context)
            if service in _OPEN_SERVICES:
                await answer(messages, context, metadata)
                return
            request_id = request_id_of(metadata)
            with (
                handling(request_id),
                self._audit.request(request_id, method) as audited,
                serving(self._tracer, method, context_of(metadata)) as span,
            ):
                try:
                    await answer(messages, context, metadata)
                except asyncio.CancelledError:
                    audited.responded(*CLIENT_LEFT, trace_id_of(span))
                    raise
                finally:
                    audited.responded(*_ended(context), trace_id_of(span))
                    if span.is_recording():
                        _describe(span, method, request_id, context)

        return grpc.stream_stream_rpc_method_handler(
            cast(Any, serve), _tolerant(handler.request_deserializer), handler.response_serializer
        )

    async def _admitted(self, service: str, context: Context, metadata: _Metadata) -> Principal:
        """Raises Unauthenticated, PermissionDenied, Unavailable."""
        if service in _OPEN_SERVICES:
            return NOBODY
        shown = Credentials.of(metadata, _peer_certificate(context))
        principal = await self._authenticator.authenticate(shown)
        current_audited().made_by(principal)
        principal.require(_PERMISSIONS.get(service, INFER))
        return principal

    async def _only(self, messages: AsyncIterator[Any]) -> Any:
        """Raises DeadlineExceeded, and InvalidRequest where there is none."""
        try:
            async with asyncio.timeout(self._message_timeout_s):
                message = _read(await anext(messages, None))
        except TimeoutError:
            raise DeadlineExceeded("the call's message did not come in time") from None
        if message is None:
            raise InvalidRequest("the call has no message")
        return message


def _pairs(context: Context) -> _Metadata:
    return [
        (key, value if isinstance(value, str) else value.decode("latin-1"))
        for key, value in context.invocation_metadata() or ()
    ]


def _describe(span: Span, method: str, request_id: str, context: Context) -> None:
    span.set_attributes({names.RPC_SYSTEM: "grpc", names.RPC_METHOD: method, names.REQUEST_ID: request_id})
    code = _code(context)
    if code is not grpc.StatusCode.OK:
        span.set_status(Status(StatusCode.ERROR, code.name))


def _code(context: Context) -> grpc.StatusCode:
    """gRPC gives a number or a member, or nothing where all is well, whatever its stubs say."""
    found: Any = context.code()
    return found if isinstance(found, grpc.StatusCode) else _CODES[found or 0]


def _ended(context: Context) -> tuple[int, str]:
    """HTTP's status and the outcome of a call that is over."""
    code = _code(context)
    return (200, "completed") if code is grpc.StatusCode.OK else (HTTP_STATUS_OF[code], code.name)


class _Unreadable:
    """In the place of a message whose bytes are none."""


_UNREADABLE = _Unreadable()


def _tolerant(decode: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """What gRPC decodes with; an error of it would be told to the client as one of ours, in the library's own words."""
    if decode is None:
        return None

    def decode_or_mark(data: bytes) -> Any:
        try:
            return decode(data)
        except DecodeError:
            return _UNREADABLE

    return decode_or_mark


@contextlib.asynccontextmanager
async def _given_back(messages: AsyncIterator[Any]) -> AsyncIterator[None]:
    """Lets go, at a call's end, of what would keep the call until the garbage collector comes."""
    try:
        yield
    except grpc.aio.AbortError as error:
        # gRPC keeps it with the call and raises it again; its traces keep the call.
        error.__traceback__ = error.__context__ = None
    finally:
        # A generator that stands still keeps the call too, and the collector only wakes it.
        await cast(AsyncGenerator[Any, None], aiter(messages)).aclose()


async def _readable(messages: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """Raises InvalidRequest at a message that is none."""
    async for message in messages:
        yield _read(message)


def _read(message: Any) -> Any:
    """Raises InvalidRequest."""
    if message is _UNREADABLE:
        raise InvalidRequest("the message is not a protobuf of the kind that this method takes")
    return message


def _behaviour(handler: "_Handler") -> Callable[[Any, Context], Any]:
    found = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    assert found is not None, "a handler has a behaviour"
    return cast(Callable[[Any, Context], Any], found)


async def _answer(behaviour: Callable[[Any, Context], Any], given: Any, context: Context) -> None:
    """One answer, several that are yielded, or those that the method writes itself."""
    made = behaviour(given, context)
    if inspect.isasyncgen(made):
        try:
            async for message in made:
                await context.write(message)
        finally:
            await made.aclose()
    elif (message := await made) is not None:
        await context.write(message)


def _peer_certificate(context: Context) -> bytes | None:
    """DER. gRPC gives it where it has checked it."""
    for pem in context.auth_context().get("x509_pem_cert", ()):
        return ssl.PEM_cert_to_DER_cert(pem.decode("ascii"))
    return None
