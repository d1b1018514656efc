"""Around the HTTP application: who calls and may it, request ids, errors as responses, counts, the audit log."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Final

from opentelemetry.trace import INVALID_SPAN, Span, Status, StatusCode, Tracer
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import Cancelled, mapping_of
from cluster.frontend.console.files import PATHS as CONSOLE_PATHS
from cluster.frontend.http_errors import error_response, log_defect
from cluster.frontend.http_protocol import PEER_CERTIFICATE
from cluster.frontend.metrics import Metrics
from cluster.frontend.own_pages import check_own_page
from cluster.identity.authenticator import IDENTITY_HEADERS, Authenticator, Credentials
from cluster.identity.principal import ADMIN, INFER, METRICS, NOBODY, Principal, acting_as
from cluster.identity.principal import Scope as Permission
from cluster.telemetry import names
from cluster.telemetry.propagation import context_of, serving, trace_id_of
from cluster.telemetry.request_id import handling, request_id_of
from cluster.telemetry.tracing import NO_TRACER
from cluster.tenants.audit import CLIENT_LEFT, NO_AUDIT, AuditLog, current_audited
from engine.errors import RemudaError

OPEN_PATHS: Final = CONSOLE_PATHS | {"/livez", "/readyz", "/health", "/v2/health/live", "/v2/health/ready"}
"""Probes have no credentials; nor has a browser that asks for the console's files."""
PERMISSIONS: Final[dict[str, Permission]] = {
    "/metrics": METRICS,
    "/v1/status": ADMIN,
    "/v1/load_lora_adapter": ADMIN,
    "/v1/unload_lora_adapter": ADMIN,
}
"""What a path asks for; any other one, known or not, asks for INFER."""
ALSO_ADMIN: Final = frozenset({"/v1/usage"})
"""Paths that show a caller what is its own, and an administrator everything."""

_UNTRACED = OPEN_PATHS | {"/metrics", "/v1/status"}
"""Probes, scrapes and consoles ask without end, and nobody asks where their time went."""
_NAMING_PATHS = ("/v1/models", "/v1/responses")
_IDENTITY_HEADERS = frozenset(name.encode() for name in IDENTITY_HEADERS)


class Gate:
    """Args:
    app: what is inside. It sees neither secrets nor what a client says of its own identity.
    authenticator: who is who.
    metrics: counts responses.
    paths: known paths, which may be labels.
    tracer: for the spans of requests.
    is_own: nobody proves anything, because only this machine reaches the server: pages of elsewhere are refused.
    audit: gets a line for each request, but those for open paths.
    """

    def __init__(
        self,
        app: ASGIApp,
        authenticator: Authenticator,
        metrics: Metrics,
        paths: frozenset[str],
        tracer: Tracer = NO_TRACER,
        is_own: bool = False,
        audit: AuditLog = NO_AUDIT,
    ) -> None:
        self._app = app
        self._is_own = is_own
        self._authenticator = authenticator
        self._metrics = metrics
        self._paths = paths
        self._tracer = tracer
        self._audit = audit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id, label = request_id_of(_headers(scope)), self._label(scope["path"])
        audit = NO_AUDIT if scope["path"] in OPEN_PATHS else self._audit
        route = f"{scope['method']} {self._route(scope['path'])}"
        with handling(request_id), audit.request(request_id, route) as audited, self._serving(scope, label) as span:
            status, outcome = await self._answer(scope, receive, send, request_id)
            audited.responded(status, outcome, trace_id_of(span))
            if span.is_recording():
                _describe(span, scope["method"], label, status, request_id)
        self._metrics.http_response(label, status)

    def _serving(self, scope: Scope, label: str) -> AbstractContextManager[Span]:
        if label in _UNTRACED:
            return nullcontext(INVALID_SPAN)
        return serving(self._tracer, f"{scope['method']} {label}", context_of(_headers(scope)))

    async def _answer(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> tuple[int, str]:
        """The response's status, or of one that never began the error's; and its outcome."""
        status: int | None = None
        outcome: str | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        path = scope["path"]
        try:
            with acting_as(await self._admitted(scope)):
                await self._app(_without_identity(scope), receive, send_with_id)
        except Exception as error:  # noqa: BLE001  whatever it is, the client gets an answer
            log_defect(error)
            if status is None and not isinstance(error, Cancelled):
                await error_response(error, path)(scope, receive, send_with_id)
            status, outcome = _told(error)
        if status is None:
            return 500, "internal"
        return status, outcome or ("completed" if status < 400 else "refused")

    def _label(self, path: str) -> str:
        """Of a path that names a thing, what kind of thing."""
        if path in self._paths:
            return path
        return next((known for known in _NAMING_PATHS if path.startswith(f"{known}/")), "other")

    def _route(self, path: str) -> str:
        """The label, where a thing that the path names is ``*``."""
        label = self._label(path)
        return label if label in (path, "other") else f"{label}/*"

    async def _admitted(self, scope: Scope) -> Principal:
        """Before a byte of the body is read. Raises Unauthenticated, PermissionDenied, Unavailable."""
        path = scope["path"]
        if self._is_own:
            check_own_page(_headers(scope))
        if path in OPEN_PATHS:
            return NOBODY
        shown = Credentials.of(_headers(scope), scope.get(PEER_CERTIFICATE))
        principal = await self._authenticator.authenticate(shown)
        current_audited().made_by(principal)
        if path not in ALSO_ADMIN or ADMIN not in principal.scopes:
            principal.require(PERMISSIONS.get(path, INFER))
        return principal


def _told(error: Exception) -> tuple[int, str]:
    """Status and outcome, as the log of calls has them."""
    if isinstance(error, Cancelled):
        return CLIENT_LEFT
    return mapping_of(error).http_status, type(error).__name__ if isinstance(error, RemudaError) else "internal"


def _headers(scope: Scope) -> Iterator[tuple[str, str]]:
    return ((name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"])


def _describe(span: Span, method: str, label: str, status: int, request_id: str) -> None:
    span.set_attributes({names.HTTP_METHOD: method, names.HTTP_ROUTE: label, names.HTTP_STATUS: status})
    span.set_attribute(names.REQUEST_ID, request_id)
    if status >= 500:
        span.set_status(Status(StatusCode.ERROR))


def _without_identity(scope: Scope) -> Scope:
    return {**scope, "headers": [pair for pair in scope["headers"] if pair[0] not in _IDENTITY_HEADERS]}
