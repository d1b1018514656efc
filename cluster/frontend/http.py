"""The HTTP API: OpenAI's endpoints, tokenizer, health and metrics, and the other APIs beside them."""

import importlib.metadata
import time
import uuid

from opentelemetry.trace import Tracer
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from cluster.errors import Unavailable, UnknownStream
from cluster.frontend.answers import Answers, HttpSettings
from cluster.frontend.anthropic.routes import AnthropicApi
from cluster.frontend.calls import Call
from cluster.frontend.chat import ChatForm, chat_call
from cluster.frontend.completions import CompletionForm, completion_call
from cluster.frontend.console.files import console_routes
from cluster.frontend.cursor import Cursor
from cluster.frontend.health import Health, Probed
from cluster.frontend.http_body import parse_body, while_connected
from cluster.frontend.http_errors import JsonResponse, plain_error
from cluster.frontend.http_gate import Gate
from cluster.frontend.limit_headers import LimitHeaders
from cluster.frontend.metrics import CONTENT_TYPE, Metrics
from cluster.frontend.moderations import ModerationForm, guard_categories, moderation_call
from cluster.frontend.ollama.routes import OllamaApi
from cluster.frontend.openai_embeddings import EmbeddingBody
from cluster.frontend.openai_schema import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    LoadAdapterBody,
    ModerationBody,
    TokenizeBody,
    UnloadAdapterBody,
)
from cluster.frontend.openapi import openapi_document
from cluster.frontend.other_prefixes import WITHOUT_DONE, OtherPrefixes
from cluster.frontend.responses.routes import ResponsesApi
from cluster.frontend.server_status import StatusApi
from cluster.frontend.service import Service
from cluster.frontend.sse import OpenAiFraming
from cluster.frontend.stored_call import StoredCall
from cluster.frontend.usage_routes import UsageApi
from cluster.identity.authenticator import Authenticator
from cluster.telemetry.tracing import NO_TRACER


class HttpApi:
    """The endpoints. Each is a coroutine from a request to a response; errors of the tree become responses above."""

    def __init__(self, answers: Answers, health: Health, metrics: Metrics) -> None:
        service = answers.service
        self._answers = answers
        self._service = service
        self._health = health
        self._metrics = metrics
        self._guard_categories = guard_categories(service.tokenizer)

    def routes(self) -> list[Route]:
        return [
            Route("/v1/models", self.list_models),
            Route("/v1/models/{model:path}", self.get_model),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
            Route("/v1/embeddings", self.embeddings, methods=["POST"]),
            Route("/v1/moderations", self.moderations, methods=["POST"]),
            Route("/v1/load_lora_adapter", self.load_adapter, methods=["POST"]),
            Route("/v1/unload_lora_adapter", self.unload_adapter, methods=["POST"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            *health_routes(self._health),
            Route("/metrics", self.render_metrics),
            Route("/openapi.json", self.openapi),
        ]

    async def list_models(self, request: Request) -> Response:
        names = self._service.model_names()
        return JsonResponse({"object": "list", "data": [self._model_object(name) for name in names]})

    async def get_model(self, request: Request) -> Response:
        name = request.path_params["model"] or "?"
        self._service.check_model(name)
        return JsonResponse(self._model_object(name))

    def _model_object(self, name: str) -> dict[str, object]:
        """``parent``: of an adapter, its base model, whose licence is shown."""
        try:
            max_model_len: int | None = self._service.max_model_len
        except Unavailable:
            max_model_len = None
        licence = self._service.licence
        return {
            "id": name,
            "object": "model",
            "created": self._service.created_unix_s,
            "owned_by": "remuda",
            "max_model_len": max_model_len,
            "license": licence.name,
            "license_source": licence.source,
            "license_notices": licence.notices,
            "attribution": licence.attribution,
            **({} if name == self._service.name else {"parent": self._service.name}),
        }

    async def completions(self, request: Request) -> Response:
        return await self._complete(request, "completion")

    async def chat_completions(self, request: Request) -> Response:
        return await self._complete(request, "chat")

    async def _complete(self, request: Request, kind: str) -> Response:
        body = await self._body(request)
        if (last_event_id := request.headers.get("last-event-id")) is not None:
            return await self._resume(request, Cursor.parse(last_event_id))
        prefix = "cmpl" if kind == "completion" else "chatcmpl"
        stored = StoredCall(kind, f"{prefix}-{uuid.uuid4().hex}", body, time.time())
        call, form, streams = self._asked(stored)
        if streams:
            keeps = request.headers.get("remuda-resumable", "") in ("1", "true")
            return self._answers.stream(call, form, _framing(request), stored if keeps else None)
        return JsonResponse(form.whole(await self._answers.whole(request, call)))

    def _asked(self, stored: StoredCall) -> tuple[Call, CompletionForm | ChatForm, bool]:
        """A request, the form of its answer, and whether it streams. Raises InvalidRequest."""
        service, created_unix_s = self._service, int(stored.created_unix_s)
        if stored.kind == "completion":
            body = parse_body(CompletionBody, stored.body)
            call = completion_call(body, stored.call_id)
            model = call.model or service.name
            return call, CompletionForm(call, body, model, created_unix_s, service.tokenizer.bytes), bool(body.stream)
        if stored.kind != "chat":
            raise UnknownStream(f"request {stored.call_id!r} did not come over HTTP; go on with it where it began")
        chat = parse_body(ChatBody, stored.body)
        call = chat_call(chat, stored.call_id)
        form = ChatForm(call, chat, call.model or service.name, created_unix_s, service.tokenizer.bytes)
        return call, form, bool(chat.stream)

    async def _resume(self, request: Request, had: Cursor) -> Response:
        """A client that came back for the rest of its stream. Raises UnknownStream."""
        found = await self._service.find(had.call_id)
        call, form, _ = self._asked(found.stored)
        return self._answers.resumed(call, found, form, _framing(request), had)

    async def moderations(self, request: Request) -> Response:
        body = parse_body(ModerationBody, await self._body(request))
        service, categories = self._service, self._guard_categories
        call = moderation_call(body, f"modr-{uuid.uuid4().hex}", categories)
        form = ModerationForm(call, categories or {}, service.name, service.tokenizer.bytes)
        return JsonResponse(form.whole(await self._answers.whole(request, call)))

    async def embeddings(self, request: Request) -> Response:
        body = parse_body(EmbeddingBody, await self._body(request))
        call = body.as_call(f"embd-{uuid.uuid4().hex}", self._service.files)
        events = await self._answers.whole(request, call)
        # In a thread: there may be millions of numbers.
        return await self._service.work.run(
            lambda: JsonResponse(body.answer(call, events, call.model or self._service.name))
        )

    async def load_adapter(self, request: Request) -> Response:
        body = parse_body(LoadAdapterBody, await self._body(request))
        await self._service.adapters.load(body.lora_name, body.lora_path)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    async def unload_adapter(self, request: Request) -> Response:
        body = parse_body(UnloadAdapterBody, await self._body(request))
        await self._service.adapters.unload(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    async def tokenize(self, request: Request) -> Response:
        body = parse_body(TokenizeBody, await self._body(request))
        work = self._service.tokenize(body.as_prompt(), body.model)
        token_ids = await while_connected(request.receive, work)
        names = self._service.tokenizer.token_strings(token_ids) if body.return_token_strs else None
        length = self._service.max_model_len
        return JsonResponse(
            {"count": len(token_ids), "max_model_len": length, "tokens": token_ids, "token_strs": names}
        )

    async def detokenize(self, request: Request) -> Response:
        body = parse_body(DetokenizeBody, await self._body(request))
        work = self._service.detokenize(body.tokens, body.model)
        return JsonResponse({"prompt": await while_connected(request.receive, work)})

    async def openapi(self, request: Request) -> Response:
        return JsonResponse(openapi_document(importlib.metadata.version("remuda")))

    async def render_metrics(self, request: Request) -> Response:
        return Response(self._metrics.render(), headers={"content-type": CONTENT_TYPE})

    async def _body(self, request: Request) -> bytes:
        return await self._answers.body(request)


def _framing(request: Request) -> OpenAiFraming:
    return OpenAiFraming(says_done=not request.scope.get(WITHOUT_DONE, False))


def health_routes(health: Probed) -> list[Route]:
    """For probes, which have no credentials."""

    async def livez(request: Request) -> Response:
        is_live, progress = health.live()
        return JsonResponse({"status": "live" if is_live else "stalled", "replicas": progress}, 200 if is_live else 503)

    async def readyz(request: Request) -> Response:
        is_ready, why = health.ready()
        return JsonResponse({"status": why}, 200 if is_ready else 503)

    return [
        *(Route(path, livez) for path in ("/livez", "/v2/health/live")),
        *(Route(path, readyz) for path in ("/readyz", "/health", "/v2/health/ready")),
    ]


async def _refused_by_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers, path = dict(error.headers or {}), request.url.path
    if error.status_code == 405:
        message = f"{path} does not take {request.method}; use {headers.get('Allow', 'another method')}"
        return plain_error(405, message, "method_not_allowed", headers, path)
    if error.status_code == 404:
        return plain_error(404, f"there is nothing at {path}", "not_found", headers, path)
    return plain_error(error.status_code, error.detail, "invalid_request", headers, path)


def build_http_app(
    service: Service,
    health: Health,
    metrics: Metrics,
    authenticator: Authenticator,
    settings: HttpSettings = HttpSettings(),
    tracer: Tracer = NO_TRACER,
    is_own: bool = False,
) -> Starlette:
    """The ASGI application. ``is_own``: of this machine alone, so that browsers may not bring others to it."""
    answers = Answers(service, settings)
    apis = (HttpApi(answers, health, metrics), OllamaApi(answers), AnthropicApi(answers), ResponsesApi(answers))
    routes = [route for api in (*apis, UsageApi(service), StatusApi(service)) for route in api.routes()]
    routes += console_routes()
    paths = frozenset(route.path for route in routes)
    gate = Middleware(
        Gate,
        authenticator=authenticator,
        metrics=metrics,
        paths=paths,
        tracer=tracer,
        is_own=is_own,
        audit=service.tenancy.audit,
    )
    around = [Middleware(OtherPrefixes), Middleware(LimitHeaders), gate]
    app = Starlette(routes=routes, middleware=around, exception_handlers={HTTPException: _refused_by_http})
    # They would name our scheme: behind a gateway that speaks TLS, keys would follow in plain text.
    app.router.redirect_slashes = False
    return app


def build_health_app(health: Probed) -> Starlette:
    """Probes alone, for a port that everybody may ask."""
    return Starlette(routes=health_routes(health), exception_handlers={HTTPException: _refused_by_http})
