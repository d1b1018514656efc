"""Anthropic's endpoints."""

import uuid

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cluster.frontend.answers import Answers
from cluster.frontend.anthropic.calls import chat_prompt, messages_call
from cluster.frontend.anthropic.form import AnthropicForm, NamedEvents
from cluster.frontend.anthropic.schema import CountBody, MessagesBody
from cluster.frontend.http_body import parse_body, while_connected
from cluster.frontend.http_errors import JsonResponse


class AnthropicApi:
    """Args:
    answers: how requests are carried out.
    """

    def __init__(self, answers: Answers) -> None:
        self._answers = answers

    def routes(self) -> list[Route]:
        return [
            Route("/v1/messages", self.messages, methods=["POST"]),
            Route("/v1/messages/count_tokens", self.count_tokens, methods=["POST"]),
        ]

    async def messages(self, request: Request) -> Response:
        body = parse_body(MessagesBody, await self._answers.body(request))
        call = messages_call(body, f"msg_{uuid.uuid4().hex}")
        form = AnthropicForm(call, call.model)
        if body.stream:
            return self._answers.stream(call, form, NamedEvents())
        return JsonResponse(form.whole(await self._answers.whole(request, call)))

    async def count_tokens(self, request: Request) -> Response:
        body = parse_body(CountBody, await self._answers.body(request))
        work = self._answers.service.tokenize(chat_prompt(body), body.model)
        token_ids = await while_connected(request.receive, work)
        return JsonResponse({"input_tokens": len(token_ids)})
