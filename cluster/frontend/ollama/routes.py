"""Ollama's endpoints."""

import importlib.metadata
import time
import uuid
from typing import Any, NoReturn

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cluster.frontend.answers import Answers
from cluster.frontend.calls import Call, Usage
from cluster.frontend.embedding import embeddings_of
from cluster.frontend.http_body import parse_body
from cluster.frontend.http_errors import JsonResponse
from cluster.frontend.ollama.calls import chat_call, embed_call, generate_call
from cluster.frontend.ollama.form import Lines, OllamaForm
from cluster.frontend.ollama.models import OllamaModels
from cluster.frontend.ollama.schema import ChatBody, EmbedBody, EmbeddingsBody, GenerateBody, ShowBody
from engine.errors import InvalidRequest

_NOT_SERVED = ("pull", "push", "create", "copy", "delete")


class OllamaApi:
    """Args:
    answers: how requests are carried out.
    """

    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self._models = OllamaModels(answers.service)

    def routes(self) -> list[Route]:
        return [
            Route("/api/generate", self.generate, methods=["POST"]),
            Route("/api/chat", self.chat, methods=["POST"]),
            Route("/api/embed", self.embed, methods=["POST"]),
            Route("/api/embeddings", self.embeddings, methods=["POST"]),
            Route("/api/tags", self.tags),
            Route("/api/show", self.show, methods=["POST"]),
            Route("/api/ps", self.ps),
            Route("/api/version", self.version),
            *(Route(f"/api/{name}", self.refuse, methods=["POST", "DELETE"]) for name in _NOT_SERVED),
        ]

    async def generate(self, request: Request) -> Response:
        body = parse_body(GenerateBody, await self._answers.body(request))
        model = self._models.served(body.model)
        form = self._form(body.model, is_chat=False)
        if not body.prompt and not body.suffix:
            return JsonResponse(form.loaded())
        return await self._answer(request, generate_call(body, model, f"gen-{uuid.uuid4().hex}"), form, body.streams)

    async def chat(self, request: Request) -> Response:
        body = parse_body(ChatBody, await self._answers.body(request))
        model = self._models.served(body.model)
        form = self._form(body.model, is_chat=True)
        if not body.messages:
            return JsonResponse(form.loaded())
        return await self._answer(request, chat_call(body, model, f"chat-{uuid.uuid4().hex}"), form, body.streams)

    def _form(self, model: str, is_chat: bool) -> OllamaForm:
        return OllamaForm(model, is_chat, self._answers.service.tokenizer.bytes, time.perf_counter_ns)

    async def _answer(self, request: Request, call: Call, form: OllamaForm, streams: bool) -> Response:
        if streams:
            return self._answers.stream(call, form, Lines())
        return JsonResponse(form.whole(await self._answers.whole(request, call, form.note)))

    async def embed(self, request: Request) -> Response:
        began_ns = time.perf_counter_ns()
        body = parse_body(EmbedBody, await self._answers.body(request))
        model = self._models.served(body.model)
        answer: dict[str, Any] = {"model": body.model, "embeddings": [], "prompt_eval_count": 0}
        # Clients have a model loaded with an empty input.
        if body.input not in (None, "", []):
            numbers, usage = await self._embedded(
                request, body.texts, body.dimensions, body.truncate is not False, model
            )
            answer |= {"embeddings": numbers, "prompt_eval_count": usage.num_prompt_tokens}
        return JsonResponse({**answer, "total_duration": time.perf_counter_ns() - began_ns, "load_duration": 0})

    async def embeddings(self, request: Request) -> Response:
        body = parse_body(EmbeddingsBody, await self._answers.body(request))
        model = self._models.served(body.model)
        if not body.prompt:
            return JsonResponse({"embedding": []})
        numbers, _ = await self._embedded(request, [body.prompt], None, True, model)
        return JsonResponse({"embedding": numbers[0]})

    async def _embedded(
        self, request: Request, texts: list[str], dimensions: int | None, truncates: bool, model: str
    ) -> tuple[list[list[float]], Usage]:
        call_id, files = f"embd-{uuid.uuid4().hex}", self._answers.service.files
        call = embed_call(texts, dimensions, truncates, model, files, call_id)
        events = await self._answers.whole(request, call)
        embeddings, usage = await self._answers.service.work.run(embeddings_of, call, events, dimensions)
        return [values.tolist() for values in embeddings], usage

    async def tags(self, request: Request) -> Response:
        return JsonResponse({"models": self._models.tags()})

    async def show(self, request: Request) -> Response:
        body = parse_body(ShowBody, await self._answers.body(request))
        return JsonResponse(self._models.show(body.model))

    async def ps(self, request: Request) -> Response:
        return JsonResponse({"models": self._models.loaded()})

    async def version(self, request: Request) -> Response:
        return JsonResponse({"version": importlib.metadata.version("remuda")})

    async def refuse(self, request: Request) -> NoReturn:
        """Raises InvalidRequest."""
        what = request.url.path.removeprefix("/api/")
        raise InvalidRequest(
            f"{what} is not served: this server's models are chosen when it starts; see /api/tags, and start"
            " `remuda serve MODEL` for another one"
        )
