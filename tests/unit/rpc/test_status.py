"""Every class of the error tree crosses a real gRPC call and comes back as itself."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from cluster.errors import ERROR_TABLE, DeadlineExceeded, ModelNotFound, Unavailable, mapping_of
from cluster.router.router import NoReplica
from cluster.rpc import status
from cluster.rpc.channel import SERVER_OPTIONS, open_channel
from engine.errors import EngineFailure, InvalidRequest, Overloaded, RemudaError

METHOD = "/test.Errors/Raise"


class Raiser:
    """A server whose one method ends with ``error``."""

    error: BaseException = EngineFailure("unset")

    async def answer(self, request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        await status.abort(context, self.error)


@pytest.fixture
async def served() -> AsyncIterator[tuple[Raiser, str]]:
    servant = Raiser()
    server = grpc.aio.server(options=SERVER_OPTIONS)
    handler = grpc.unary_unary_rpc_method_handler(servant.answer)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Errors", {"Raise": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield servant, f"127.0.0.1:{port}"
    await server.stop(None)


@pytest.fixture
async def raiser(served: tuple[Raiser, str]) -> AsyncIterator[tuple[Raiser, grpc.aio.Channel]]:
    async with open_channel(served[1]) as channel:
        yield served[0], channel


async def call(channel: grpc.aio.Channel) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary(METHOD)(b"", timeout=10)
    return caught.value


def example(kind: type[RemudaError]) -> RemudaError:
    text = f"{kind.__name__}: naïve × 7 is bad;\nuse 8"
    if issubclass(kind, InvalidRequest):
        return kind(text, "größe[0]")
    if issubclass(kind, Overloaded | Unavailable):
        return kind(text, 2.5)
    return kind(text)


async def test_every_class_survives_the_wire(raiser: tuple[Raiser, grpc.aio.Channel]) -> None:
    servant, channel = raiser
    for kind in ERROR_TABLE:
        servant.error = example(kind)
        failed = await call(channel)
        assert failed.code() is mapping_of(kind).grpc_status
        found = status.error_from_rpc(failed)
        told = str(servant.error)
        if mapping_of(kind).http_status >= 500:
            told = told.partition("\n")[0]  # of a fault of ours what it was, and no trace behind it
        assert type(found) is kind and str(found) == told
        assert vars(found) == vars(servant.error)
        assert dict(failed.trailing_metadata() or ())[status.CODE_KEY] == mapping_of(kind).code


async def test_a_blocking_client_sees_the_same(served: tuple[Raiser, str]) -> None:
    servant, address = served
    servant.error = InvalidRequest("top_p must be above 0", "top_p")

    def blocking() -> RemudaError:
        with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(METHOD)(b"", timeout=10)
        return status.error_from_rpc(caught.value)

    found = await asyncio.to_thread(blocking)
    assert type(found) is InvalidRequest and found.param == "top_p"


async def test_defects_do_not_tell_what_is_inside(raiser: tuple[Raiser, grpc.aio.Channel]) -> None:
    servant, channel = raiser
    servant.error = KeyError("a customer's prompt")
    failed = await call(channel)
    assert failed.code() is grpc.StatusCode.INTERNAL
    assert "prompt" not in repr(failed)
    assert type(status.error_from_rpc(failed)) is EngineFailure


async def test_a_private_subclass_travels_as_its_public_parent(raiser: tuple[Raiser, grpc.aio.Channel]) -> None:
    servant, channel = raiser
    servant.error = NoReplica("none is ready", 3.0)
    found = status.error_from_rpc(await call(channel))
    assert type(found) is Unavailable and found.retry_after_s == 3.0


async def test_long_messages_fit_into_the_headers(raiser: tuple[Raiser, grpc.aio.Channel]) -> None:
    servant, channel = raiser
    servant.error = InvalidRequest("x" * 100_000)
    assert str(status.error_from_rpc(await call(channel))) == "x" * status.MAX_MESSAGE_CHARS
    # On the wire each of these has twelve bytes.
    servant.error = ModelNotFound("😀" * 3000)
    found = status.error_from_rpc(await call(channel))
    assert type(found) is ModelNotFound
    assert 300 < len(str(found)) < 400 and set(str(found)) == {"😀"}
    servant.error = InvalidRequest("no", "größe" * 10_000)
    assert type(status.error_from_rpc(await call(channel))) is InvalidRequest


async def test_failures_of_grpc_itself_find_their_class() -> None:
    async with open_channel("127.0.0.1:1") as channel:
        failed = await call(channel)
    assert type(status.error_from_rpc(failed)) is Unavailable
    silent = grpc.aio.AioRpcError(
        grpc.StatusCode.DEADLINE_EXCEEDED, grpc.aio.Metadata(), grpc.aio.Metadata(), details="late"
    )
    assert type(status.error_from_rpc(silent)) is DeadlineExceeded


def test_a_class_that_is_not_known_here_is_an_engine_failure() -> None:
    found = status.error_of(status.ErrorFields("FromTheFuture", "what it says"))
    assert type(found) is EngineFailure and str(found) == "what it says"
