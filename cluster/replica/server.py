"""The leader's gRPC server around the engine loop. Knows no Ray.

Front ends attach with one multiplexed stream each. What a step gave goes to each of them as one packed frame; when a
stream breaks, what came over it goes on for a grace time, in which any front end may go on reading it.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from typing import TypeVar

import grpc
from opentelemetry.trace import Tracer

from cluster.errors import Cancelled, TakenOver, Unauthenticated, Unavailable, UnknownStream
from cluster.replica.attachment import Attachment
from cluster.replica.engine_loop import EngineLoop, StepOutputs
from cluster.replica.held_streams import GRACE_S, HeldStreams
from cluster.replica.listen import listen
from cluster.replica.rank_states import WatchedGang, rank_infos
from cluster.replica.request_spans import record as record_spans
from cluster.replica.servicer import Context, ReplicaServicer
from cluster.replica.stream_history import StreamHistory
from cluster.rpc import convert, status
from cluster.rpc.aio_server import make_server
from cluster.rpc.channel import SERVER_OPTIONS
from cluster.rpc.generated.remuda.v1 import replica_pb2, replica_pb2_grpc
from cluster.rpc.health import Health, add_health_and_reflection
from cluster.rpc.shared_secret import check_secret
from cluster.telemetry.tracing import NO_TRACER
from cluster.types import RankInfo, ReplicaInfo
from engine.errors import EngineFailure, InvalidRequest, RemudaError
from engine.executor.flight_record import FlightRecord, parts
from engine.request import AdapterInfo

_log = logging.getLogger(__name__)

_Change = TypeVar("_Change")

FORMER_LEADER_S = 10.0
"""So long the leader before may take to die, and to let go of its port, when Ray has been told to kill it: one that is
stopped takes some 5 s."""
RETURN_S = 10.0
"""Within it every front end has attached to a new leader, and begun there what ran at the one before."""
SERVICE_NAME = replica_pb2.DESCRIPTOR.services_by_name["Replica"].full_name


class LeaderServer:
    """Serves one engine loop, which it starts and stops.

    Args:
        engine_loop: not started yet.
        info: what does not change while the replica lives; ``address`` is filled in by ``start``.
        bind: host:port to listen at; port 0 takes a free one.
        needs_port: whether that port being in use is an error. Otherwise another one is taken then.
        is_successor: it takes the place of a leader that is being ended: its port is waited for, and what ran there may
            still come.
        secret: what every caller must show; empty: nothing (for tests on one machine).
        credentials: for TLS; None listens in plain text.
        on_failure: called once, in the event loop, when the engine failed for good.
        grace_s: so long a request goes on without a reader.
        gang: the ranks that compute now; None: nobody knows where they are.
        record: what ``dump`` gives.
        tracer: for the spans of requests.
    """

    def __init__(
        self,
        engine_loop: EngineLoop,
        info: ReplicaInfo,
        bind: str = "127.0.0.1:0",
        needs_port: bool = True,
        is_successor: bool = False,
        secret: str = "",
        credentials: grpc.ServerCredentials | None = None,
        on_failure: Callable[[RemudaError], None] | None = None,
        on_drain: Callable[[], None] = lambda: None,
        on_adapters: Callable[[dict[str, str]], None] = lambda adapters: None,
        grace_s: float = GRACE_S,
        gang: Callable[[], WatchedGang | None] = lambda: None,
        record: FlightRecord | None = None,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        self._tracer = tracer
        self._engine_loop = engine_loop
        self._info = info
        self._bind = bind
        self._needs_port = needs_port
        self._is_successor = is_successor
        self._expects_until_s = 0.0
        self._secret = secret
        self._credentials = credentials
        self._on_failure = on_failure
        self._on_drain = on_drain
        self._on_adapters = on_adapters
        self._gang = gang
        self._record = record or FlightRecord()
        self._streams = HeldStreams(grace_s)
        self._sweep_interval_s = min(1.0, grace_s / 4)
        self._sweeper: asyncio.Task[None] | None = None
        self._attachments: dict[Attachment, None] = {}
        self._server: grpc.aio.Server | None = None
        self._health: Health | None = None
        self._is_closing = False

    async def start(self) -> str:
        """Starts the engine loop, listens, and returns host:port.

        Raises:
            StartFailed: the address cannot be bound.
        """
        assert self._server is None, "a leader's server starts once"
        server = make_server(options=SERVER_OPTIONS)
        replica_pb2_grpc.add_ReplicaServicer_to_server(ReplicaServicer(self), server)
        self._health = await add_health_and_reflection(server, [SERVICE_NAME])
        wait_s = FORMER_LEADER_S if self._is_successor else 0.0
        port = await listen(server, self._bind, self._credentials, needs_port=self._needs_port, wait_s=wait_s)
        event_loop = asyncio.get_running_loop()
        self._engine_loop.start(lambda outputs: _hand_over(event_loop, self._deliver, outputs))
        await server.start()
        self._server = server
        self._expects_until_s = _now_s() + (RETURN_S if self._is_successor else 0.0)
        self._info = replace(self._info, address=f"{self._bind.rpartition(':')[0]}:{port}")
        await self._health.set_serving(True)
        self._sweeper = asyncio.create_task(self._sweep())
        return self._info.address

    def info(self) -> ReplicaInfo:
        """The replica at this moment."""
        load = self._engine_loop.load()
        failure = self._engine_loop.failure
        gang = self._gang()
        return replace(
            self._info,
            ranks=rank_infos(self._info.ranks, gang, failure),
            state=self._engine_loop.state,
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            kv_cache_usage=load.kv_cache_usage,
            num_steps=load.num_steps,
            experts=load.experts,
            progress_age_s=load.progress_age_s,
            progress_limit_s=0.0 if gang is None else gang.progress_limit_s,
            error="" if failure is None else str(failure),
            adapters=self._engine_loop.adapters,
        )

    def set_ranks(self, ranks: tuple[RankInfo, ...], phase_seconds: dict[str, float]) -> None:
        """The gang has formed anew. From any thread."""
        self._info = replace(self._info, ranks=ranks, phase_seconds=phase_seconds)

    def dump(self) -> Iterator[bytes]:
        """The replica's flight record, in parts."""
        return parts(self._record.lines())

    @property
    def num_live_requests(self) -> int:
        return self._streams.num_live

    async def drain(self) -> None:
        """Refuses new requests from now on; what runs may finish."""
        self._engine_loop.drain()
        self._on_drain()
        await self._set_not_serving()

    def load_adapter(self, name: str, path: str) -> "Future[AdapterInfo]":
        return self._told(self._engine_loop.load_adapter(name, path))

    def unload_adapter(self, name: str) -> "Future[None]":
        return self._told(self._engine_loop.unload_adapter(name))

    def _told(self, change: "Future[_Change]") -> "Future[_Change]":
        loop = self._engine_loop
        change.add_done_callback(lambda _: self._on_adapters({each.name: each.path for each in loop.adapters}))
        return change

    async def stop(self, grace_s: float = 5.0) -> None:
        """Ends the engine loop and the server. What still runs ends with Unavailable; ``drain`` first to avoid that."""
        if self._server is None or self._is_closing:
            return
        self._is_closing = True
        if self._sweeper is not None:
            self._sweeper.cancel()
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
        streams = self._streams
        for request_id, waits in step.outputs.begun:
            if (begun := streams.live_one(request_id)) is not None:
                begun.begin(waits)
        streams.add_tokens(step.outputs.request_ids, step.outputs.token_ids)
        for output in step.outputs.others:
            stream = streams.live_one(output.request_id)
            if stream is None:
                continue  # aborted: nobody waits for it
            stream.add(output)
            if output.finish_reason is not None:
                streams.end(stream, _now_s())
        for output, timeline in step.outputs.ended:
            record_spans(self._tracer, self._info.id, output, timeline)
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
        if (stream := self._streams.live_one(request_id)) is not None:
            stream.fail(error)
            self._streams.end(stream, _now_s())

    def _fail_all(self, error: RemudaError) -> None:
        for stream in self._streams.live():
            self._fail(stream.request_id, error)
        for attachment in self._attachments:
            attachment.wake.set()

    async def _sweep(self) -> None:
        """Ends what nobody came back for."""
        while True:
            await asyncio.sleep(self._sweep_interval_s)
            for stream in self._streams.overdue(_now_s()):
                self._abort(stream, keeps_history=False)

    async def authenticate(self, context: Context) -> None:
        """Ends the call where the caller does not know the secret."""
        try:
            check_secret(self._secret, context.invocation_metadata())
        except Unauthenticated as error:
            await status.abort(context, error)

    # What follows serves one front end's stream.

    def attach(self, front_end_id: str) -> Attachment:
        attachment = Attachment(front_end_id, self._info.incarnation)
        self._attachments[attachment] = None
        return attachment

    def detach(self, attachment: Attachment) -> None:
        """What is read over the stream goes on without a reader."""
        self._attachments.pop(attachment, None)
        for stream in list(attachment.streams.values()):
            self._leave_unread(stream)

    def find(self, call_id: str) -> replica_pb2.FindRequestResponse:
        """What is known of one client's request. Raises UnknownStream, or Unavailable where that is not sure yet."""
        held = self._streams.of_call(call_id)
        if not held and _now_s() < self._expects_until_s:
            raise Unavailable("a lost leader's requests may still come here; try again shortly")
        if not held:
            raise UnknownStream(f"this replica has nothing of request {call_id!r} (any more)")
        return replica_pb2.FindRequestResponse(
            request_ids=[stream.request_id for stream in held],
            client_request=next((stream.client_request for stream in held if stream.client_request), b""),
            incarnation=self._info.incarnation,
        )

    def take(self, attachment: Attachment, frame: replica_pb2.FrontEndFrame) -> None:
        """One frame from a front end.

        Raises:
            InvalidRequest: a frame that the protocol forbids here; the stream is to be ended.
        """
        kind = frame.WhichOneof("frame")
        if kind == "submit":
            self._submit(attachment, frame.submit)
        elif kind == "credit":
            if (stream := attachment.streams.get(frame.credit.stream)) is not None:
                stream.credit(frame.credit.position)
                attachment.wake.set()
        elif kind == "abort":
            self._take_abort(attachment, frame.abort)
        elif kind == "resume":
            self._resume(attachment, frame.resume)
        elif kind == "goodbye":
            self.give_up_all(attachment)
            attachment.close()
        else:
            raise InvalidRequest(f"a front end sends no {kind} after its hello", "frame")

    def _submit(self, attachment: Attachment, submit: replica_pb2.Submit) -> None:
        _check_free(attachment, submit.stream)
        request = convert.request_from_proto(submit)
        if self._streams.live_one(request.request_id) is not None:
            # Two that read it, at one front end or two, have replayed it here.
            error: RemudaError = TakenOver(f"request {request.request_id!r} goes on for another reader")
        else:
            try:
                self._engine_loop.submit(request)
            except RemudaError as refusal:
                error = refusal
            else:
                given = request.token_ids[request.num_prompt_tokens :]
                has_logprobs = request.sampling.logprobs is not None
                stream = StreamHistory(request.request_id, submit.resumable, submit.client_request, given, has_logprobs)
                self._streams.add(stream)
                stream.attach(attachment, submit.stream, len(given), window=submit.window)
                return
        attachment.put_error(submit.stream, error)
        attachment.wake.set()

    def _resume(self, attachment: Attachment, resume: replica_pb2.Resume) -> None:
        _check_free(attachment, resume.stream)
        stream = self._streams.find(resume.request_id)
        if stream is None or not stream.first_position <= resume.num_tokens <= stream.num_tokens:
            error = UnknownStream(f"this replica does not have what follows of request {resume.request_id!r}")
            attachment.put_error(resume.stream, error)
        else:
            self._streams.note_read(stream)
            stream.attach(attachment, resume.stream, resume.num_tokens, resume.num_prompt_logprobs, resume.window)
        attachment.wake.set()

    def _take_abort(self, attachment: Attachment, abort: replica_pb2.AbortRequest) -> None:
        if abort.request_id:
            stream = self._streams.live_one(abort.request_id)
            # Somebody else may read it by now.
            if stream is None or (stream.has_reader and not abort.even_if_read):
                return
            stream.turn_away(Cancelled("the request was cancelled"))
        else:
            stream = attachment.streams.get(abort.stream)
            attachment.forget(abort.stream)
        if stream is not None:
            if abort.keep:
                self._give_up(stream)
            else:
                self._abort(stream)

    def give_up_all(self, attachment: Attachment) -> None:
        """Who reads over this attachment leaves for good, or is cut off."""
        for stream in list(attachment.streams.values()):
            self._give_up(stream)

    def _give_up(self, stream: StreamHistory) -> None:
        """Its reader will not come back; its client may."""
        if stream.is_resumable:
            self._leave_unread(stream)
        else:
            self._abort(stream)

    def _leave_unread(self, stream: StreamHistory) -> None:
        stream.detach()
        self._streams.note_unread(stream, _now_s())

    def _abort(self, stream: StreamHistory, keeps_history: bool = True) -> None:
        """``keeps_history``: of a resumable one, for a client that missed the last of what its front end had."""
        stream.detach()
        if self._streams.live_one(stream.request_id) is not stream:
            return
        self._engine_loop.abort(stream.request_id)
        if keeps_history and stream.is_resumable:
            stream.fail(Unavailable("this request was ended"))
            self._streams.end(stream, _now_s())
        else:
            self._streams.drop(stream)


def _now_s() -> float:
    return asyncio.get_running_loop().time()


def _check_free(attachment: Attachment, stream: int) -> None:
    """Raises InvalidRequest: the front end breaks the protocol."""
    if stream in attachment.streams:
        raise InvalidRequest(f"stream {stream} is live already; choose another number", "stream")


def _hand_over(
    event_loop: asyncio.AbstractEventLoop, deliver: Callable[[StepOutputs], None], outputs: StepOutputs
) -> None:
    event_loop.call_soon_threadsafe(deliver, outputs)
