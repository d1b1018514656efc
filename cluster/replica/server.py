"""The leader's gRPC server around the engine loop. Knows no Ray.

Front ends attach with one multiplexed stream each. What a step gave goes to each of them as one packed frame; when a
stream breaks, what came over it is aborted.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import grpc

from cluster.errors import StartFailed, Unauthenticated, Unavailable
from cluster.replica.attachment import Attachment
from cluster.replica.engine_loop import EngineLoop, StepOutputs
from cluster.rpc import convert, status
from cluster.rpc.channel import SERVER_OPTIONS
from cluster.rpc.generated.remuda.v1 import replica_pb2, replica_pb2_grpc
from cluster.rpc.health import Health, add_health_and_reflection
from cluster.rpc.shared_secret import check_secret
from cluster.types import RankInfo, ReplicaInfo
from engine.errors import EngineFailure, InvalidRequest, RankFailure, RemudaError
from engine.request import AdapterInfo

_log = logging.getLogger(__name__)

SERVICE_NAME = replica_pb2.DESCRIPTOR.services_by_name["Replica"].full_name

_Context = grpc.aio.ServicerContext[Any, Any]


class LeaderServer:
    """Serves one engine loop, which it starts and stops.

    Args:
        engine_loop: not started yet.
        info: what does not change while the replica lives; ``address`` is filled in by ``start``.
        bind: host:port to listen at; port 0 takes a free one.
        secret: what every caller must show; empty: nothing (for tests on one machine).
        credentials: for TLS; None listens in plain text.
        on_failure: called once, in the event loop, when the engine failed for good.
    """

    def __init__(
        self,
        engine_loop: EngineLoop,
        info: ReplicaInfo,
        bind: str = "127.0.0.1:0",
        secret: str = "",
        credentials: grpc.ServerCredentials | None = None,
        on_failure: Callable[[RemudaError], None] | None = None,
    ) -> None:
        self._engine_loop = engine_loop
        self._info = info
        self._bind = bind
        self._secret = secret
        self._credentials = credentials
        self._on_failure = on_failure
        self._routes: dict[str, tuple[Attachment, int]] = {}
        """Every live request → where its tokens go."""
        self._attachments: set[Attachment] = set()
        self._server: grpc.aio.Server | None = None
        self._health: Health | None = None
        self._is_closing = False

    async def start(self) -> str:
        """Starts the engine loop, listens, and returns host:port.

        Raises:
            StartFailed: the address cannot be bound.
        """
        assert self._server is None, "a leader's server starts once"
        server = grpc.aio.server(options=SERVER_OPTIONS)
        replica_pb2_grpc.add_ReplicaServicer_to_server(_ReplicaService(self), server)
        self._health = await add_health_and_reflection(server, [SERVICE_NAME])
        try:
            if self._credentials is None:
                port = server.add_insecure_port(self._bind)
            else:
                port = server.add_secure_port(self._bind, self._credentials)
        except RuntimeError as error:
            raise StartFailed(f"the leader cannot listen at {self._bind}: {error}; choose a free port") from error
        event_loop = asyncio.get_running_loop()
        self._engine_loop.start(lambda outputs: _hand_over(event_loop, self._deliver, outputs))
        await server.start()
        self._server = server
        self._info = replace(self._info, address=f"{self._bind.rpartition(':')[0]}:{port}")
        await self._health.set_serving(True)
        return self._info.address

    def info(self) -> ReplicaInfo:
        """The replica at this moment."""
        load = self._engine_loop.load()
        failure = self._engine_loop.failure
        return replace(
            self._info,
            ranks=self._ranks(failure),
            state=self._engine_loop.state,
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            kv_cache_usage=load.kv_cache_usage,
            num_steps=load.num_steps,
            progress_age_s=load.progress_age_s,
            error="" if failure is None else str(failure),
            adapters=self._engine_loop.adapters,
        )

    def _ranks(self, failure: RemudaError | None) -> tuple[RankInfo, ...]:
        """When the gang has failed, the rank that was lost and those that ended because of it are told apart."""
        if failure is None:
            return self._info.ranks
        lost = failure.rank if isinstance(failure, RankFailure) else None
        return tuple(replace(rank, state="lost" if rank.rank == lost else "ended") for rank in self._info.ranks)

    @property
    def num_live_requests(self) -> int:
        return len(self._routes)

    async def drain(self) -> None:
        """Refuses new requests from now on; what runs may finish."""
        self._engine_loop.drain()
        await self._set_not_serving()

    def load_adapter(self, name: str, path: str) -> "Future[AdapterInfo]":
        return self._engine_loop.load_adapter(name, path)

    def unload_adapter(self, name: str) -> "Future[None]":
        return self._engine_loop.unload_adapter(name)

    async def stop(self, grace_s: float = 5.0) -> None:
        """Ends the engine loop and the server. What still runs ends with Unavailable; ``drain`` first to avoid that."""
        if self._server is None or self._is_closing:
            return
        self._is_closing = True
        await self.drain()
        if not await asyncio.to_thread(self._engine_loop.stop, grace_s):
            _log.error("the engine's step did not end within %g s; leaving it behind", grace_s)
        self._fail_all(Unavailable("this replica was stopped"))
        for attachment in self._attachments:
            attachment.close()
        await self._server.stop(grace_s)

    async def _set_not_serving(self) -> None:
        if self._health is not None:
            await self._health.set_serving(False)

    def _deliver(self, step: StepOutputs) -> None:
        """In the event loop, once per step: sorts what it gave by front end and wakes their writers."""
        for output in step.outputs:
            route = self._routes.get(output.request_id)
            if route is None:
                continue  # aborted: nobody waits for it
            attachment, stream = route
            attachment.put(stream, output)
            if output.finish_reason is not None:
                self._drop_route(output.request_id)
        for request_id, error in step.errors:
            self._fail(request_id, error)
        for attachment in self._attachments:
            if attachment.has_waiting:
                attachment.wake.set()
        if step.failure is not None:
            self._fail_all(step.failure)
            _log.error("the engine failed: %s", step.failure)
            self._failure_task = asyncio.ensure_future(self._announce_failure(step.failure))

    async def _announce_failure(self, failure: EngineFailure) -> None:
        await self._set_not_serving()
        if self._on_failure is not None:
            self._on_failure(failure)

    def _fail(self, request_id: str, error: RemudaError) -> None:
        if (route := self._routes.get(request_id)) is not None:
            attachment, stream = route
            attachment.put_error(stream, error)
            self._drop_route(request_id)

    def _fail_all(self, error: RemudaError) -> None:
        for request_id in list(self._routes):
            self._fail(request_id, error)
        for attachment in self._attachments:
            attachment.wake.set()

    def _drop_route(self, request_id: str) -> None:
        attachment, stream = self._routes.pop(request_id)
        del attachment.request_ids[stream]

    async def authenticate(self, context: _Context) -> None:
        """Ends the call where the caller does not know the secret."""
        try:
            check_secret(self._secret, context.invocation_metadata())
        except Unauthenticated as error:
            await status.abort(context, error)

    # What follows serves one front end's stream.

    def attach(self, front_end_id: str) -> Attachment:
        attachment = Attachment(front_end_id, self._info.incarnation)
        self._attachments.add(attachment)
        return attachment

    def detach(self, attachment: Attachment) -> None:
        """Aborts what came over the stream and has not ended."""
        self._attachments.discard(attachment)
        for request_id in list(attachment.request_ids.values()):
            self._abort(request_id)

    def take(self, attachment: Attachment, frame: replica_pb2.FrontEndFrame) -> None:
        """One frame from a front end.

        Raises:
            InvalidRequest: a frame that the protocol forbids here; the stream is to be ended.
        """
        kind = frame.WhichOneof("frame")
        if kind == "submit":
            self._submit(attachment, frame.submit)
        elif kind == "abort":
            stream = frame.abort.stream
            attachment.forget(stream)
            if (request_id := attachment.request_ids.get(stream)) is not None:
                self._abort(request_id)
        else:
            raise InvalidRequest(f"a front end sends submit or abort after its hello, not {kind}", "frame")

    def _submit(self, attachment: Attachment, submit: replica_pb2.Submit) -> None:
        if submit.stream in attachment.request_ids:
            raise InvalidRequest(f"stream {submit.stream} is live already; choose another number", "stream")
        request = convert.request_from_proto(submit)
        if request.request_id in self._routes:
            error: RemudaError = InvalidRequest(f"request {request.request_id!r} is live already", "request_id")
        else:
            try:
                self._engine_loop.submit(request)
            except RemudaError as refusal:
                error = refusal
            else:
                self._routes[request.request_id] = (attachment, submit.stream)
                attachment.request_ids[submit.stream] = request.request_id
                return
        attachment.put_error(submit.stream, error)
        attachment.wake.set()

    def _abort(self, request_id: str) -> None:
        self._drop_route(request_id)
        self._engine_loop.abort(request_id)


def _hand_over(
    event_loop: asyncio.AbstractEventLoop, deliver: Callable[[StepOutputs], None], outputs: StepOutputs
) -> None:
    event_loop.call_soon_threadsafe(deliver, outputs)


class _ReplicaService(replica_pb2_grpc.ReplicaServicer):
    """The rpcs of remuda.v1.Replica."""

    def __init__(self, leader: LeaderServer) -> None:
        self._leader = leader

    async def Attach(  # type: ignore[override]
        self, request_iterator: AsyncIterator[replica_pb2.FrontEndFrame], context: _Context
    ) -> None:
        await self._leader.authenticate(context)
        hello = await anext(request_iterator, None)
        if hello is None or hello.WhichOneof("frame") != "hello":
            await status.abort(context, InvalidRequest("a front end's first frame must be hello", "frame"))
        attachment = self._leader.attach(hello.hello.front_end_id)
        reader = asyncio.ensure_future(self._read(attachment, request_iterator))
        try:
            await context.write(attachment.next_frame())
            while not attachment.is_closing or attachment.has_waiting:
                while attachment.has_waiting:
                    await context.write(attachment.next_frame())
                if not attachment.is_closing:
                    await attachment.wake.wait()
                    attachment.wake.clear()
            if reader.done() and (error := reader.exception()) is not None:
                await status.abort(context, error)
        finally:
            reader.cancel()
            self._leader.detach(attachment)

    async def _read(self, attachment: Attachment, frames: AsyncIterator[replica_pb2.FrontEndFrame]) -> None:
        """Until the front end closes its side, or sends what it must not."""
        try:
            async for frame in frames:
                self._leader.take(attachment, frame)
        finally:
            attachment.close()

    async def GetInfo(self, request: replica_pb2.GetInfoRequest, context: _Context) -> replica_pb2.ReplicaInfo:
        await self._leader.authenticate(context)
        return convert.replica_info_to_proto(self._leader.info())

    async def Drain(self, request: replica_pb2.DrainReplicaRequest, context: _Context) -> replica_pb2.ReplicaInfo:
        await self._leader.authenticate(context)
        await self._leader.drain()
        return convert.replica_info_to_proto(self._leader.info())

    async def LoadAdapter(self, request: replica_pb2.LoadAdapterRequest, context: _Context) -> replica_pb2.Adapter:
        await self._leader.authenticate(context)
        try:
            loaded = await asyncio.wrap_future(self._leader.load_adapter(request.name, request.path))
        except RemudaError as error:
            await status.abort(context, error)
        return convert.adapter_to_proto(loaded)

    async def UnloadAdapter(
        self, request: replica_pb2.UnloadAdapterRequest, context: _Context
    ) -> replica_pb2.UnloadAdapterResponse:
        await self._leader.authenticate(context)
        try:
            await asyncio.wrap_future(self._leader.unload_adapter(request.name))
        except RemudaError as error:
            await status.abort(context, error)
        return replica_pb2.UnloadAdapterResponse()
