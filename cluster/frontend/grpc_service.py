"""remuda.v1.Inference for clients: the same service as HTTP, in protobuf."""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

import grpc

from cluster.errors import DeadlineExceeded, UnknownStream
from cluster.frontend.calls import (
    Call,
    ChatPrompt,
    Delta,
    Echo,
    Event,
    Finished,
    Prompt,
    SamplingOptions,
    Started,
    StructuredOutput,
    TextPrompt,
    TimeLimits,
    TokenPrompt,
)
from cluster.frontend.cursor import ChoicePosition, Cursor, Remainder
from cluster.frontend.embedding import embedding_call, embeddings_of
from cluster.frontend.grpc_stream import Context, until_overdue
from cluster.frontend.http_errors import log_defect
from cluster.frontend.model_files import ModelFiles
from cluster.frontend.service import Service
from cluster.frontend.stored_call import StoredCall
from cluster.rpc.convert import SAMPLING_SCALARS, finish_reason_to_proto, grammar_from_proto, logprobs_to_proto
from cluster.rpc.generated.remuda.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from cluster.rpc.status import abort
from engine.errors import InvalidRequest

_log = logging.getLogger(__name__)


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """Args:
    service: the path of every request.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    # The stubs know generators only; this form of gRPC's can be left while a write is blocked.
    async def Generate(  # type: ignore[override]
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> None:
        try:
            if request.HasField("resume"):
                await self._resume(request.resume, context)
                return
            time_remaining_s = context.time_remaining()
            call, stored = call_of(request, time_remaining_s), None
            if request.resumable:
                stored = StoredCall("grpc", call.request_id, request.SerializeToString(), time.time())
            failed = asyncio.Event()
            await self._stream(call, self._service.generate(call, failed, stored), failed, context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001  whatever it is, the client gets a status
            log_defect(error)
            await abort(context, error)

    async def Cancel(self, request: inference_pb2.CancelRequest, context: Context) -> inference_pb2.CancelResponse:
        try:
            await self._service.cancel(request.request_id)
            return inference_pb2.CancelResponse()
        except Exception as error:  # noqa: BLE001  as above
            log_defect(error)
            await abort(context, error)

    async def _resume(self, point: inference_pb2.ResumePoint, context: Context) -> None:
        """Raises UnknownStream, and as ``_stream`` does."""
        had = cursor_of(point)
        found = await self._service.find(had.call_id)
        if found.stored.kind != "grpc":
            raise UnknownStream(f"request {had.call_id!r} did not come over gRPC; go on with it where it began")
        request = inference_pb2.GenerateRequest.FromString(found.stored.body)
        call = replace(call_of(request, context.time_remaining()), request_id=found.stored.call_id)
        failed = asyncio.Event()
        await self._stream(call, self._service.resume(call, found, failed), failed, context, Remainder(had))

    async def _stream(
        self,
        call: Call,
        events: AsyncGenerator[Event, None],
        failed: asyncio.Event,
        context: Context,
        remainder: Remainder | None = None,
    ) -> None:
        """Raises the request's error, and DeadlineExceeded for a client that does not read after its request failed."""
        await until_overdue(self._write_all(call, events, context, remainder), failed)

    async def _write_all(
        self, call: Call, events: AsyncGenerator[Event, None], context: Context, remainder: Remainder | None
    ) -> None:
        async with aclosing(events):
            async for event in events:
                rest = event if remainder is None else remainder.of(event)
                if rest is not None:
                    await context.write(response_of(call, rest))

    async def Embed(self, request: inference_pb2.EmbedRequest, context: Context) -> inference_pb2.EmbedResponse:
        try:
            dimensions = request.dimensions if request.HasField("dimensions") else None
            call = embed_call_of(request, dimensions, context.time_remaining(), self._service.files)
            async with aclosing(self._service.generate(call)) as events:
                come = [event async for event in events]
            embeddings, usage = await self._service.work.run(embeddings_of, call, come, dimensions)
            return inference_pb2.EmbedResponse(
                request_id=call.request_id,
                model=call.model or self._service.name,
                embeddings=[inference_pb2.Embedding(values=values) for values in embeddings],
                num_prompt_tokens=usage.num_prompt_tokens,
            )
        except Exception as error:  # noqa: BLE001  as above
            log_defect(error)
            await abort(context, error)

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: Context
    ) -> inference_pb2.TokenizeResponse:
        try:
            token_ids = await self._service.tokenize(_tokenize_prompt(request), request.model)
            return inference_pb2.TokenizeResponse(token_ids=token_ids, max_model_len=self._service.max_model_len)
        except Exception as error:  # noqa: BLE001  as above
            log_defect(error)
            await abort(context, error)

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: Context
    ) -> inference_pb2.DetokenizeResponse:
        try:
            text = await self._service.detokenize(request.token_ids, request.model)
            return inference_pb2.DetokenizeResponse(text=text)
        except Exception as error:  # noqa: BLE001  as above
            log_defect(error)
            await abort(context, error)

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Context
    ) -> inference_pb2.ListModelsResponse:
        try:
            service = self._service
            length, created_unix_s = service.max_model_len, service.created_unix_s
            models = [
                inference_pb2.Model(
                    id=name,
                    max_model_len=length,
                    created_unix_s=created_unix_s,
                    parent="" if name == service.name else service.name,
                )
                for name in service.model_names()
            ]
            return inference_pb2.ListModelsResponse(models=models)
        except Exception as error:  # noqa: BLE001  as above
            log_defect(error)
            await abort(context, error)


def call_of(request: inference_pb2.GenerateRequest, time_remaining_s: float | None) -> Call:
    """A field that is not there is the default's. Raises InvalidRequest, and DeadlineExceeded where no time is left."""
    if time_remaining_s is not None and time_remaining_s <= 0:
        raise DeadlineExceeded("the call's deadline had passed when the call came")
    first_token_s = request.first_token_timeout_s if request.HasField("first_token_timeout_s") else None
    return Call(
        # A client's own name for a request may not be unique; what the engine sees is.
        request_id=f"{request.request_id[:64] or 'rpc'}-{uuid.uuid4().hex}",
        prompts=[_prompt_of(request)],
        model=request.model,
        options=_options_of(request.sampling),
        n=request.n if request.HasField("n") else 1,
        stop=list(request.stop),
        echo=request.echo,
        limits=TimeLimits(total_s=time_remaining_s, first_token_s=first_token_s),
        priority=request.priority,
        cache_salt=request.cache_salt,
    )


def embed_call_of(
    request: inference_pb2.EmbedRequest, dimensions: int | None, time_remaining_s: float | None, files: ModelFiles
) -> Call:
    """Raises as ``call_of`` does."""
    if time_remaining_s is not None and time_remaining_s <= 0:
        raise DeadlineExceeded("the call's deadline had passed when the call came")
    return embedding_call(
        f"{request.request_id[:64] or 'rpc'}-{uuid.uuid4().hex}",
        [_input_of(each) for each in request.inputs],
        dimensions,
        files,
        model=request.model,
        limits=TimeLimits(total_s=time_remaining_s),
        priority=request.priority,
        cache_salt=request.cache_salt,
    )


def _input_of(each: inference_pb2.EmbedInput) -> Prompt:
    kind = each.WhichOneof("input")
    if kind == "token_ids":
        return TokenPrompt(list(each.token_ids.ids))
    if kind is None or not each.text:
        raise InvalidRequest("an input must be text or token_ids, and must not be empty", "inputs")
    return TextPrompt(each.text)


def cursor_of(point: inference_pb2.ResumePoint) -> Cursor:
    """Where a client is that comes back."""
    positions = {
        each.choice: ChoicePosition(each.num_tokens, each.num_characters, is_finished=each.finished)
        for each in point.choices
    }
    return Cursor(point.request_id, positions)


def _prompt_of(request: inference_pb2.GenerateRequest) -> Prompt:
    kind = request.WhichOneof("prompt")
    if kind == "text":
        if not request.text:
            raise InvalidRequest("text must not be empty", "text")
        return TextPrompt(request.text)
    if kind == "token_ids":
        return TokenPrompt(list(request.token_ids.ids))
    if kind == "chat":
        return ChatPrompt(_messages(request.chat))
    raise InvalidRequest("give one of text, token_ids and chat", "prompt")


def _messages(chat: inference_pb2.Chat) -> list[dict[str, str]]:
    if not chat.messages:
        raise InvalidRequest("chat.messages must not be empty", "chat.messages")
    return [{"role": message.role, "content": message.content} for message in chat.messages]


def _tokenize_prompt(request: inference_pb2.TokenizeRequest) -> Prompt:
    kind = request.WhichOneof("input")
    is_given = request.HasField("add_special_tokens")
    if kind == "text":
        return TextPrompt(request.text, request.add_special_tokens if is_given else True)
    if kind == "chat":
        return ChatPrompt(_messages(request.chat), add_special_tokens=request.add_special_tokens)
    raise InvalidRequest("give one of text and chat", "input")


def _options_of(message: common_pb2.SamplingParams) -> SamplingOptions:
    present = {field.name for field, _ in message.ListFields()}
    grammar = grammar_from_proto(message)
    if grammar is None and message.HasField("grammar"):
        raise InvalidRequest("give one of json_schema, regex, lark and gbnf", "sampling.grammar")
    return SamplingOptions(
        **{name: getattr(message, name) for name in SAMPLING_SCALARS if name in present},
        logit_bias=dict(message.logit_bias),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        structured=StructuredOutput(grammar, "sampling.grammar") if grammar else None,
    )


def response_of(call: Call, event: Event) -> inference_pb2.GenerateResponse:
    """One event as one message."""
    response = inference_pb2.GenerateResponse(request_id=call.request_id)
    if isinstance(event, Started):
        response.started.model = event.model
        response.started.num_prompt_tokens = sum(map(len, event.prompt_token_ids))
    elif isinstance(event, Echo):
        response.delta.choice = event.choice
        response.delta.text = event.text
    elif isinstance(event, Delta):
        delta = response.delta
        delta.choice, delta.text, delta.position = event.choice, event.text, event.position
        delta.token_ids.extend(event.token_ids)
        delta.logprobs.extend(map(logprobs_to_proto, event.logprobs or ()))
    elif isinstance(event, Finished):
        finished = response.finished
        finished.choice, finished.reason = event.choice, finish_reason_to_proto(event.reason)
        if event.stop_string is not None:
            finished.stop_string = event.stop_string
        if event.stop_token_id is not None:
            finished.stop_token_id = event.stop_token_id
    else:
        response.usage.num_prompt_tokens = event.num_prompt_tokens
        response.usage.num_completion_tokens = event.num_completion_tokens
        response.usage.num_cached_tokens = event.num_cached_tokens
    return response
