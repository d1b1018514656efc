"""remuda.v1 over real sockets with plain gRPC clients."""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cluster.errors import ERROR_TABLE, Cancelled, DeadlineExceeded
from cluster.frontend.grpc_service import call_of
from cluster.frontend.model_files import read_model_files
from cluster.frontend.tokenizer import Tokenizer
from cluster.rpc.generated.remuda.v1 import admin_pb2, admin_pb2_grpc, common_pb2, inference_pb2, inference_pb2_grpc
from cluster.rpc.inference_client import GenerateOptions, InferenceClient, Summary, TextDelta
from cluster.rpc.status import error_from_rpc
from cluster.types import ReplicaState
from engine.errors import InvalidRequest, RemudaError
from engine.request import Output, Request
from tests.frontend.scripted import Gate, replica_info, says
from tests.frontend.servers import TINY, served

EOT = 2036


def chat(text: str = "Hi", **changes: Any) -> inference_pb2.GenerateRequest:
    messages = [inference_pb2.ChatMessage(role="user", content=text)]
    return inference_pb2.GenerateRequest(chat=inference_pb2.Chat(messages=messages), **changes)


async def responses(channel: Any, request: inference_pb2.GenerateRequest, **options: Any) -> list[Any]:
    call = inference_pb2_grpc.InferenceStub(channel).Generate(request, **options)
    return [response async for response in call]


async def test_a_stream_from_start_to_usage(tiny: Tokenizer) -> None:
    ids = tiny.encode("Hello, wörld 🙂!", add_special_tokens=False)
    async with served(says(ids, stop_token_id=EOT, num_cached_tokens=2)) as one:
        sampling = common_pb2.SamplingParams(temperature=0.0, max_tokens=40, logprobs=1, seed=-5, top_k=3)
        got = await responses(one.channel, chat(sampling=sampling, request_id="mine", model="m"))
        kinds = [response.WhichOneof("event") for response in got]
        assert kinds[0] == "started"
        assert kinds[-2:] == ["finished", "usage"]
        assert set(kinds[1:-2]) == {"delta"}
        assert got[0].started.model == "m"
        prompt = tiny.encode_chat([{"role": "user", "content": "Hi"}])
        assert got[0].started.num_prompt_tokens == len(prompt)
        deltas = [response.delta for response in got[1:-2]]
        assert "".join(delta.text for delta in deltas) == "Hello, wörld 🙂!"
        assert [token_id for delta in deltas for token_id in delta.token_ids] == [*ids, EOT]
        assert [entry.logprob for delta in deltas for entry in delta.logprobs] == [-i / 1000 for i in [*ids, EOT]]
        positions = [delta.position for delta in deltas]
        assert positions == [sum(len(earlier.token_ids) for earlier in deltas[:i]) for i in range(len(deltas))]
        assert got[-2].finished.reason == common_pb2.FINISH_REASON_STOP
        assert got[-2].finished.stop_token_id == EOT
        assert not got[-2].finished.HasField("stop_string")
        usage = got[-1].usage
        assert (usage.num_prompt_tokens, usage.num_completion_tokens, usage.num_cached_tokens) == (
            len(prompt), len(ids) + 1, 2
        )  # fmt: skip
        assert all(response.request_id.startswith("mine-") for response in got)
        engine = one.backend.requests[0]
        assert engine.token_ids == prompt
        assert (engine.sampling.temperature, engine.sampling.seed, engine.sampling.top_k) == (0.0, -5, 3)


async def test_absent_fields_take_the_checkpoints_defaults(tiny: Tokenizer) -> None:
    async with served(says([300])) as one:
        await responses(one.channel, inference_pb2.GenerateRequest(text="Hi"))
        await responses(
            one.channel, inference_pb2.GenerateRequest(text="Hi", sampling=common_pb2.SamplingParams(temperature=0.0))
        )
        defaults = read_model_files(TINY).sampling_defaults
        assert [request.sampling.temperature for request in one.backend.requests] == [defaults["temperature"], 0.0]
        assert {request.sampling.top_p for request in one.backend.requests} == {defaults["top_p"]}


async def test_token_ids_n_stop_and_echo(tiny: Tokenizer) -> None:
    ids = tiny.encode(" one two three", add_special_tokens=False)
    async with served(says(ids)) as one:
        request = inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=tiny.encode("Hi")), n=2, stop=["two"], echo=True
        )
        got = await responses(one.channel, request)
        for choice in range(2):
            deltas = [event.delta for event in got if event.HasField("delta") and event.delta.choice == choice]
            assert "".join(delta.text for delta in deltas) == "Hi one "
        ends = [event.finished for event in got if event.HasField("finished")]
        assert sorted(end.choice for end in ends) == [0, 1]
        assert {end.stop_string for end in ends} == {"two"}


async def test_the_command_lines_client(tiny: Tokenizer) -> None:
    ids = tiny.encode("Hello there", add_special_tokens=False)
    async with served(says(ids, stop_token_id=EOT)) as one:

        def talk() -> tuple[list[Any], Any]:
            with InferenceClient(f"127.0.0.1:{one.front_end.grpc_port}") as client:
                return list(client.chat([("user", "Hi")], GenerateOptions(max_tokens=40))), client.status()

        events, status = await asyncio.to_thread(talk)
        assert "".join(event.text for event in events if isinstance(event, TextDelta)) == "Hello there"
        assert isinstance(events[-1], Summary)
        assert events[-1].finish_reason == "stop"
        assert (status.model, status.draining, [replica.id for replica in status.replicas]) == ("m", False, ["r0"])


async def test_tokenize_detokenize_and_models(tiny: Tokenizer) -> None:
    async with served(says([300])) as one:
        stub = inference_pb2_grpc.InferenceStub(one.channel)
        given = await stub.Tokenize(inference_pb2.TokenizeRequest(text="Hi 🙂"))
        assert list(given.token_ids) == tiny.encode("Hi 🙂")
        assert given.max_model_len == 512
        bare = await stub.Tokenize(inference_pb2.TokenizeRequest(text="Hi", add_special_tokens=False))
        assert list(bare.token_ids) == tiny.encode("Hi", add_special_tokens=False)
        told = await stub.Tokenize(inference_pb2.TokenizeRequest(chat=chat().chat))
        assert list(told.token_ids) == tiny.encode_chat([{"role": "user", "content": "Hi"}])
        back = await stub.Detokenize(inference_pb2.DetokenizeRequest(token_ids=given.token_ids))
        assert back.text == "<|begin_of_text|>Hi 🙂"
        models = await stub.ListModels(inference_pb2.ListModelsRequest())
        assert [(model.id, model.max_model_len) for model in models.models] == [("m", 512)]


@pytest.mark.parametrize(
    ("request_", "status", "param"),
    [
        (inference_pb2.GenerateRequest(), grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
        (inference_pb2.GenerateRequest(text=""), grpc.StatusCode.INVALID_ARGUMENT, "text"),
        (inference_pb2.GenerateRequest(chat=inference_pb2.Chat()), grpc.StatusCode.INVALID_ARGUMENT, "chat.messages"),
        (inference_pb2.GenerateRequest(text="a", n=0), grpc.StatusCode.INVALID_ARGUMENT, "n"),
        (chat(sampling=common_pb2.SamplingParams(max_tokens=0)), grpc.StatusCode.INVALID_ARGUMENT, "max_tokens"),
        (chat(sampling=common_pb2.SamplingParams(top_p=2.0)), grpc.StatusCode.INVALID_ARGUMENT, "top_p"),
        (chat(sampling=common_pb2.SamplingParams(max_tokens=900)), grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
        (chat(model="other"), grpc.StatusCode.NOT_FOUND, None),
    ],
)
async def test_bad_requests(request_: Any, status: grpc.StatusCode, param: str | None) -> None:
    async with served(says([300])) as one:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await responses(one.channel, request_)
        assert caught.value.code() is status
        error = error_from_rpc(caught.value)
        assert getattr(error, "param", None) == param
        assert one.backend.requests == []


async def test_every_error_has_its_status() -> None:
    raised: list[type[RemudaError]] = []

    async def script(request: Request) -> AsyncGenerator[Output, None]:
        yield Output(request.request_id, [300])
        raise raised[-1]("because")

    async with served(script) as one:
        for kind, mapping in ERROR_TABLE.items():
            raised.append(kind)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await responses(one.channel, chat())
            assert caught.value.code() is mapping.grpc_status
            assert caught.value.details() == "because"
            assert type(error_from_rpc(caught.value)) is kind
    assert Cancelled in raised


async def test_cancelling_the_call_stops_the_work() -> None:
    async with served(Gate(before=[300])) as one:
        call = inference_pb2_grpc.InferenceStub(one.channel).Generate(chat(n=2))
        async for response in call:
            if response.HasField("delta"):
                break
        call.cancel()
        await one.backend.until(lambda: len(one.backend.aborted) == 2)
        await asyncio.wait_for(one.front_end.service.admission.wait_idle(), 5)


async def test_the_calls_deadline_is_the_requests() -> None:
    async with served(Gate(before=[300])) as one:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await responses(one.channel, chat(), timeout=0.2)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await one.backend.until(lambda: not one.backend.live)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await responses(one.channel, chat(first_token_timeout_s=-1.0))
        assert isinstance(error_from_rpc(caught.value), InvalidRequest)
    async with served(Gate()) as one:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await responses(one.channel, chat(first_token_timeout_s=0.05))
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "first token" in (caught.value.details() or "")


async def test_a_deadline_that_has_passed_is_no_bad_field() -> None:
    with pytest.raises(DeadlineExceeded):
        call_of(chat(), -0.1)


async def test_admin_passes_a_flight_record_on() -> None:
    async with served(Gate(after=[])) as one:
        admin = admin_pb2_grpc.AdminStub(one.channel)
        parts = [part.data async for part in admin.DumpRecord(admin_pb2.DumpReplicaRecordRequest(replica="r0"))]
        assert parts == [b"r", b"0"]


async def test_admin_shows_and_drains() -> None:
    gate = Gate(after=[300])
    async with served(gate) as one:
        admin = admin_pb2_grpc.AdminStub(one.channel)
        running = asyncio.create_task(responses(one.channel, chat()))
        await one.backend.until(lambda: bool(one.backend.live))
        status = await admin.GetStatus(admin_pb2.GetStatusRequest())
        assert (status.model, status.draining, status.num_live_requests) == ("m", False, 1)
        assert [replica.id for replica in status.replicas] == ["r0"]
        await admin.Drain(admin_pb2.DrainRequest(replica="r0"))
        assert one.backend.drained == ["r0"]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await admin.Drain(admin_pb2.DrainRequest(replica="r9"))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert (await admin.Drain(admin_pb2.DrainRequest())).num_live_requests == 1
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await responses(one.channel, chat())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        gate.opened.set()
        assert (await running)[-1].HasField("usage")
        assert (await one.http.get("/readyz")).status_code == 503
        assert (await one.http.get("/livez")).status_code == 200


async def test_keys_guard_all_but_health(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("alpha-of-the-herd\n")
    async with served(says([300]), key="alpha-of-the-herd", api_key_file=path) as one:
        metadata = (("authorization", "Bearer alpha-of-the-herd"),)
        for given in (None, (("authorization", "Bearer beta-of-the-herd"),)):
            for attempt in (
                responses(one.channel, chat(), metadata=given),
                admin_pb2_grpc.AdminStub(one.channel).GetStatus(admin_pb2.GetStatusRequest(), metadata=given),
                admin_pb2_grpc.AdminStub(one.channel).Drain(admin_pb2.DrainRequest(), metadata=given),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await attempt
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert (await responses(one.channel, chat(), metadata=metadata))[-1].HasField("usage")
        answer = await health_pb2_grpc.HealthStub(one.channel).Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_grpc_health_follows_readiness() -> None:
    async with served(says([300])) as one:
        stub = health_pb2_grpc.HealthStub(one.channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="remuda.v1.Inference"))
        updates = aiter(watch)
        assert (await anext(updates)).status == health_pb2.HealthCheckResponse.SERVING
        one.backend.infos = [replica_info(ReplicaState.FAILED)]
        assert (await asyncio.wait_for(anext(updates), 5)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        one.backend.infos = [replica_info()]
        assert (await asyncio.wait_for(anext(updates), 5)).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()


async def test_reflection_lists_the_services() -> None:
    async with served(says([300])) as one:
        stub = reflection_pb2_grpc.ServerReflectionStub(one.channel)
        call = stub.ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        listed = {service.name for service in (await call.read()).list_services_response.service}
        assert {"remuda.v1.Inference", "remuda.v1.Admin", "grpc.health.v1.Health"} <= listed
        await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol="remuda.v1.Inference"))
        answer = await call.read()
        file = descriptor_pb2.FileDescriptorProto.FromString(answer.file_descriptor_response.file_descriptor_proto[0])
        assert file.package == "remuda.v1"
        await call.done_writing()


async def test_priority_and_cache_salt_reach_the_engine() -> None:
    async with served(says([300])) as one:
        await responses(one.channel, chat(priority=-7, cache_salt="tenant"))
        await responses(one.channel, chat())
        assert [(request.priority, request.cache_salt) for request in one.backend.requests] == [(-7, "tenant"), (0, "")]
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await responses(one.channel, chat(cache_salt="x" * 257))
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "method",
    [
        "/remuda.v1.Inference/Tokenize",
        "/remuda.v1.Admin/GetStatus",
        "/vllm.grpc.engine.VllmEngine/GetLoads",
        "/grpc.health.v1.Health/Check",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    ],
)
async def test_bytes_that_are_no_message_are_the_clients_fault(method: str, caplog: pytest.LogCaptureFixture) -> None:
    async with served(says([300])) as one:
        call = one.channel.unary_unary(method)(b"\xff")
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "protobuf" in await call.details()
        assert not caplog.records


async def test_a_method_that_a_library_left_out() -> None:
    async with served(says([300])) as one:
        call = one.channel.unary_unary("/grpc.health.v1.Health/List")(b"")
        assert await call.code() is grpc.StatusCode.UNIMPLEMENTED
