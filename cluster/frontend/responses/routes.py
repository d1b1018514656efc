"""The endpoints of the Responses API."""

import time
import uuid
from contextlib import aclosing

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cluster.frontend.answers import Answers
from cluster.frontend.calls import Event
from cluster.frontend.clock import LoopClock
from cluster.frontend.http_body import while_connected
from cluster.frontend.http_errors import JsonResponse
from cluster.frontend.responses.form import ResponseForm
from cluster.frontend.responses.responses import Responses
from cluster.frontend.responses.store import StoredResponse
from cluster.frontend.whole_answer import stable_id
from engine.errors import InvalidRequest


class ResponsesApi:
    """Args:
    answers: how requests are carried out.
    """

    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self._responses = Responses(answers.service, LoopClock())

    def routes(self) -> list[Route]:
        one = "/v1/responses/{response_id}"
        return [
            Route("/v1/responses", self.create, methods=["POST"]),
            Route(one, self.get),
            Route(one, self.delete, methods=["DELETE"]),
            Route(f"{one}/cancel", self.cancel, methods=["POST"]),
            Route(f"{one}/input_items", self.input_items),
        ]

    async def create(self, request: Request) -> Response:
        raw = await self._answers.body(request)
        stored, call, kept = await self._responses.prepare(raw, f"resp_{uuid.uuid4().hex}", int(time.time()))
        form = self._form(stored)
        if not stored.body.is_stored:
            if stored.body.stream:
                return self._answers.stream(call, form, form)
            return JsonResponse(form.response(await self._answers.whole(request, call)))
        live = self._responses.begin(stored, call, kept)
        if stored.body.stream:
            return self._answers.shown(live.follow(), live.failed, form, form)
        if stored.body.background:
            async with aclosing(live.follow()) as events:
                await anext(events)  # refused requests say so at once
            return JsonResponse(form.response([]))

        async def collect() -> list[Event]:
            return [event async for event in live.follow()]

        return JsonResponse(form.response(await while_connected(request.receive, collect())))

    async def get(self, request: Request) -> Response:
        stored = await self._responses.find(request.path_params["response_id"])
        if request.query_params.get("stream", "false") != "true":
            return self._shown(stored)
        form = self._form(stored, _starting_after(request))
        events, failed = self._responses.follow(stored)
        return self._answers.shown(events, failed, form, form, has_begun=True)

    async def delete(self, request: Request) -> Response:
        response_id = request.path_params["response_id"]
        await self._responses.delete(response_id)
        return JsonResponse({"id": response_id, "object": "response", "deleted": True})

    async def cancel(self, request: Request) -> Response:
        return self._shown(await self._responses.cancel(request.path_params["response_id"]))

    async def input_items(self, request: Request) -> Response:
        stored = await self._responses.find(request.path_params["response_id"])
        items = [
            {"id": f"item_{stable_id(stored.response_id, 'input', index)}", **item}
            for index, item in enumerate(stored.items)
        ]
        ends = (
            {"first_id": items[0]["id"], "last_id": items[-1]["id"]} if items else {"first_id": None, "last_id": None}
        )
        return JsonResponse({"object": "list", "data": items, "has_more": False, **ends})

    def _shown(self, stored: StoredResponse) -> Response:
        return JsonResponse(self._form(stored).response(list(stored.events), stored.error))

    def _form(self, stored: StoredResponse, starting_after: int = -1) -> ResponseForm:
        service = self._answers.service
        return ResponseForm(
            stored.response_id,
            stored.body,
            stored.body.model or service.name,
            stored.created_unix_s,
            service.tokenizer.bytes,
            starting_after,
        )


def _starting_after(request: Request) -> int:
    given = request.query_params.get("starting_after")
    if given is None:
        return -1
    if not (given.isascii() and given.isdecimal() and len(given) <= 18):
        raise InvalidRequest("starting_after must be the sequence_number of an event", "starting_after")
    return int(given)
