"""vLLM's gRPC protocol over a scripted model, with the stubs made from the protocol as it was published."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc
import pytest

from cluster.rpc.generated.vllm import common_pb2, vllm_engine_pb2_grpc
from cluster.rpc.generated.vllm import vllm_engine_pb2 as pb
from cluster.types import ReplicaInfo
from engine.errors import EngineFailure
from engine.request import GrammarKind, Output, Request
from tests.frontend.bodies import EOT
from tests.frontend.scripted import Gate, ScriptedBackend, embedding_of, says
from tests.frontend.servers import Served, served

SAID = [300, 301, 302, 303]
PROMPT = pb.TokenizedInput(input_ids=[5, 6, 7, 8])


def stub_of(one: Served) -> Any:
    return vllm_engine_pb2_grpc.VllmEngineStub(one.channel)


def asked(**sampling: Any) -> pb.GenerateRequest:
    stream = sampling.pop("stream", True)
    params = pb.SamplingParams(**sampling)
    return pb.GenerateRequest(request_id="q", tokenized=PROMPT, sampling_params=params, stream=stream)


async def parts_of(
    one: Served, request: pb.GenerateRequest
) -> tuple[list[pb.GenerateStreamChunk], list[pb.GenerateComplete]]:
    responses = [response async for response in stub_of(one).Generate(request, timeout=20)]
    chunks = [response.chunk for response in responses if response.HasField("chunk")]
    return chunks, [response.complete for response in responses if response.HasField("complete")]


async def test_chunks_add_up_to_the_whole() -> None:
    async with served(ScriptedBackend(says(SAID, stop_token_id=EOT, num_cached_tokens=2))) as one:
        chunks, (complete,) = await parts_of(one, asked())
        assert [token for chunk in chunks for token in chunk.token_ids] == list(complete.output_ids) == [*SAID, EOT]
        assert (complete.finish_reason, complete.prompt_tokens, complete.cached_tokens) == ("stop", 4, 2)
        assert complete.completion_tokens == chunks[-1].completion_tokens == len(SAID) + 1
        assert one.backend.requests[0].token_ids == list(PROMPT.input_ids)
        none, completes = await parts_of(one, asked(stream=False, n=2, max_tokens=2))
        assert not none and [each.index for each in completes] == [0, 1]
        assert [list(each.output_ids) for each in completes] == [SAID[:2], SAID[:2]]
        assert {each.finish_reason for each in completes} == {"length"}


async def test_zeros_are_defaults_and_what_is_said_reaches_the_engine() -> None:
    async with served(ScriptedBackend(says(SAID))) as one:
        await parts_of(one, asked())
        sampling = one.backend.requests[-1].sampling
        assert (sampling.top_p, sampling.top_k, sampling.repetition_penalty) == (0.9, 0, 1.0), "the checkpoint's top_p"
        said: dict[str, Any] = {"temperature": 0.0, "top_p": 0.5, "top_k": 3, "min_p": 0.25, "repetition_penalty": 1.5}
        said |= {"min_tokens": 2, "max_tokens": 4, "seed": 9, "logit_bias": {7: 2.0}, "stop_token_ids": [303]}
        await parts_of(one, asked(**said))
        sampling = one.backend.requests[-1].sampling
        for name in (
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "repetition_penalty",
            "min_tokens",
            "seed",
            "logit_bias",
        ):
            assert getattr(sampling, name) == said[name], name
        assert 303 in sampling.stop_token_ids
        await parts_of(one, asked(truncate_prompt_tokens=2))
        assert one.backend.requests[-1].token_ids == [7, 8]
        for constraint, kind in (
            ({"json_schema": '{"type":"object"}'}, GrammarKind.JSON_SCHEMA),
            ({"json_object": True}, GrammarKind.JSON_SCHEMA),
            ({"regex": "a+"}, GrammarKind.REGEX),
            ({"choice": pb.ChoiceConstraint(choices=["yes", "no"])}, GrammarKind.LARK),
        ):
            await parts_of(one, asked(**constraint))
            assert one.backend.requests[-1].sampling.grammar.kind is kind


async def test_stop_strings_and_logprobs() -> None:
    async with served(ScriptedBackend(says(SAID))) as one:
        stop = one.front_end.service.tokenizer.decode(SAID[2:3])
        _, (complete,) = await parts_of(one, asked(stop=[stop]))
        assert (complete.matched_stop_str, complete.finish_reason) == (stop, "stop")
        chunks, (complete,) = await parts_of(one, asked(logprobs=2, prompt_logprobs=1, max_tokens=2))
        entries = complete.output_logprobs
        assert list(entries.token_logprobs) == pytest.approx([-0.3, -0.301])
        assert [list(top.token_ids) for top in entries.top_logprobs] == [[301, 302], [302, 303]]
        assert list(chunks[0].output_logprobs.token_ids) == SAID[:1]
        given = complete.input_logprobs
        assert list(given.token_ids) == list(PROMPT.input_ids) and given == chunks[0].input_logprobs
        assert not given.token_logprobs[0].HasField("value")
        assert [each.value for each in given.token_logprobs[1:]] == pytest.approx([-0.006, -0.007, -0.008])


async def test_abort() -> None:
    gate = Gate(before=SAID[:2], after=SAID[2:])
    async with served(ScriptedBackend(gate)) as one:
        call = stub_of(one).Generate(asked(), timeout=20)
        first = await call.read()
        assert first.HasField("chunk")
        await stub_of(one).Abort(pb.AbortRequest(request_ids=["other"]), timeout=20)
        assert one.backend.live
        await stub_of(one).Abort(pb.AbortRequest(request_ids=["q"]), timeout=20)
        rest = [first]
        while (response := await call.read()) is not grpc.aio.EOF:
            rest.append(response)
        assert rest[-1].complete.finish_reason == "abort"
        assert list(rest[-1].complete.output_ids) == SAID[: len(rest[-1].complete.output_ids)]
        await one.backend.until(lambda: bool(one.backend.aborted))
        # A caller who goes away has its work stopped too.
        gone = stub_of(one).Generate(asked(), timeout=20)
        await gone.read()
        gone.cancel()
        await one.backend.until(lambda: len(one.backend.aborted) == 2)


async def test_errors_are_statuses() -> None:
    async def breaks(request: Request) -> AsyncIterator[Output]:
        yield Output(request.request_id, SAID[:1])
        raise EngineFailure("the engine broke")

    async with served(ScriptedBackend(breaks)) as one:  # type: ignore[arg-type]
        bad = [
            (asked(), grpc.StatusCode.INTERNAL, "the engine broke"),
            (pb.GenerateRequest(request_id="q"), grpc.StatusCode.INVALID_ARGUMENT, "tokenized and text"),
            (asked(logprobs=-1), grpc.StatusCode.INVALID_ARGUMENT, "logprobs"),
            # Refused before anything is made for each of them: 400 million would take more memory than there is.
            (asked(n=400_000_000), grpc.StatusCode.INVALID_ARGUMENT, "n must be from 1"),
            (asked(structural_tag="x"), grpc.StatusCode.INVALID_ARGUMENT, "structural tags"),
            (
                pb.GenerateRequest(tokenized=PROMPT, media_refs=pb.MediaRefs()),
                grpc.StatusCode.INVALID_ARGUMENT,
                "media_refs",
            ),
            (
                pb.GenerateRequest(tokenized=pb.TokenizedInput(input_ids=[10**6])),
                grpc.StatusCode.INVALID_ARGUMENT,
                "1000000",
            ),
        ]
        for request, status, words in bad:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await parts_of(one, request)
            assert caught.value.code() is status and words in (caught.value.details() or ""), request
        for method, request in (
            ("FlushCache", common_pb2.FlushCacheRequest()),
            ("StartProfile", common_pb2.StartProfileRequest()),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await getattr(stub_of(one), method)(request, timeout=20)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        for method, request in (
            ("GetTokenizer", common_pb2.GetTokenizerRequest()),
            ("SubscribeKvEvents", common_pb2.SubscribeKvEventsRequest()),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await getattr(stub_of(one), method)(request, timeout=20).read()
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_embeddings() -> None:
    async with served(ScriptedBackend(says([]))) as one:
        answer = await stub_of(one).Embed(pb.EmbedRequest(request_id="e", tokenized=PROMPT), timeout=20)
        assert list(answer.embedding) == list(embedding_of(PROMPT.input_ids))
        assert (answer.prompt_tokens, answer.embedding_dim) == (4, 256)
        for ids in ([], [10**6]):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub_of(one).Embed(pb.EmbedRequest(tokenized=pb.TokenizedInput(input_ids=ids)), timeout=20)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    async with served(ScriptedBackend(Gate())) as one:
        asking = asyncio.ensure_future(
            stub_of(one).Embed(pb.EmbedRequest(request_id="e", tokenized=PROMPT), timeout=20)
        )
        await one.backend.until(lambda: bool(one.backend.live))
        await stub_of(one).Abort(pb.AbortRequest(request_ids=["e"]), timeout=20)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asking
        assert caught.value.code() is grpc.StatusCode.CANCELLED and not one.backend.live


async def test_what_routers_ask_of_the_server() -> None:
    gate = Gate(before=SAID[:1], after=SAID[1:])
    async with served(ScriptedBackend(gate)) as one:
        stub = stub_of(one)
        assert (await stub.HealthCheck(pb.HealthCheckRequest(), timeout=20)).healthy
        info = await stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=20)
        assert (info.served_model_name, info.max_context_length, info.vocab_size) == ("m", 512, 2048)
        assert info.is_generation and list(info.architectures) == ["Llama4ForCausalLM"] and EOT in info.eos_token_ids
        assert "/" not in info.model_path + info.tokenizer_path
        one.backend.infos = [
            replica for each in one.backend.infos for replica in (each, _busy(each, num_running=3, kv_cache_usage=0.5))
        ]
        (load,) = (await stub.GetLoads(pb.GetLoadsRequest(), timeout=20)).loads
        assert (load.num_running_reqs, load.max_total_num_tokens, load.num_used_tokens) == (3, 2048, 512)
        assert load.token_usage == 0.25 and load.max_running_requests == 16
        running = asyncio.create_task(parts_of(one, asked()))
        await one.backend.until(lambda: bool(one.backend.live))
        server = await stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=20)
        assert (server.active_requests, server.max_num_seqs, server.block_size) == (1, 16, 16)
        assert not server.is_paused and server.last_receive_timestamp > 1.7e9
        gate.opened.set()
        await running


def _busy(info: ReplicaInfo, **changes: Any) -> ReplicaInfo:
    return replace(info, id="r1", **changes)
