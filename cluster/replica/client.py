"""A front end's side of the multiplexed stream to one replica's leader."""

import asyncio
import itertools
import logging
import random
from collections import deque
from collections.abc import AsyncGenerator, Callable

import grpc

from cluster.errors import ConnectionLost, Unauthenticated, Unavailable
from cluster.identity.cluster_tls import CLUSTER_NAME, ClusterTls
from cluster.replica.keep import Keep
from cluster.replica.leader_calls import LeaderCalls
from cluster.replica.stream_buffer import StreamBuffer
from cluster.replica.wake_pacer import WakePacer
from cluster.rpc import convert
from cluster.rpc.channel import open_channel
from cluster.rpc.generated.remuda.v1 import replica_pb2, replica_pb2_grpc
from cluster.rpc.status import error_from_rpc
from cluster.types import ReplicaInfo, ReplicaState
from engine.errors import ContextLengthExceeded, InvalidOption, Overloaded, ProtocolViolation, RemudaError
from engine.request import FinishReason, Output, Request

_log = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 2.0
MAX_REQUEST_TOKENS = 10_000_000
"""At 5 bytes each still below channel.MAX_MESSAGE_BYTES: a message over it would break the stream for all."""

GOODBYE_TIMEOUT_S = 1.0
CROSSED = "Internal error from Core"
REASON_TIMEOUT_S = 2.0
MAX_ABANDONED = 4096
"""Requests that the leader is told to end when the connection is back; it ends the others after its grace time."""
WINDOW = 2048
"""Tokens of one request that may be on their way, or here, before its reader has taken them. The others wait at the
leader, at 4 bytes each."""

_AttachCall = grpc.aio.StreamStreamCall[replica_pb2.FrontEndFrame, replica_pb2.LeaderFrame]


class ReplicaClient(LeaderCalls):
    """Requests to one replica, all over one stream, which is attached again whenever it breaks.

    Args:
        address: host:port of the leader.
        front_end_id: names this front end in the leader's log.
        secret: what the leader asks its callers for.
        tls: the cluster's; None speaks plain text.
        max_streams: most requests that may run at once over this client.
        randomness: spreads the times at which several front ends try to attach again.
    """

    def __init__(
        self,
        address: str,
        front_end_id: str,
        secret: str = "",
        tls: ClusterTls | None = None,
        max_streams: int = 4096,
        randomness: random.Random | None = None,
    ) -> None:
        self._front_end_id = front_end_id
        super().__init__(address, secret)
        self._tls = tls
        self._max_streams = max_streams
        self._random = randomness or random.Random()
        self._channel: grpc.aio.Channel | None = None
        self._task: asyncio.Task[None] | None = None
        self._attached = asyncio.Event()
        self._answered = asyncio.Event()
        self._is_closing = False
        self._incarnation = 0
        self._streams: dict[int, StreamBuffer] = {}
        self._pacer = WakePacer()
        self.on_change: Callable[[], None] = _nothing
        """Called when the connection was made or lost."""
        self._abandoned: deque[str] = deque(maxlen=MAX_ABANDONED)
        self._request_ids: dict[int, str] = {}
        self._stream_numbers = itertools.count()
        self._outbox: deque[replica_pb2.FrontEndFrame] = deque()
        self._outbox_filled = asyncio.Event()
        self._last_state = ReplicaState.STARTING

    async def connect(self, timeout_s: float = 10.0) -> None:
        """Attaches for the first time. After a failure it goes on trying in the background until ``close``.

        Raises:
            Unavailable: the leader did not answer in time, or refused.
        """
        if not self.is_connected:
            self._answered.clear()
        if self._task is None:
            self._channel, self._stub = self._dial()
            self._task = asyncio.create_task(self._stay_attached())
        try:
            async with asyncio.timeout(timeout_s):
                await self._answered.wait()
        except TimeoutError:
            raise Unavailable(f"no leader answers at {self.address}: {self._last_error}") from None
        if not self.is_connected:
            raise Unavailable(f"{self._last_error}; --secret-file must have the secret of what started the leader")

    def _dial(self) -> "tuple[grpc.aio.Channel, replica_pb2_grpc.ReplicaAsyncStub]":
        credentials = None if self._tls is None else self._tls.client_credentials()
        channel = open_channel(self.address, credentials, CLUSTER_NAME)
        return channel, replica_pb2_grpc.ReplicaStub(channel)

    async def close(self) -> None:
        """Live streams end with ConnectionLost; the leader ends them too, but for those whose clients may come back.
        Nothing is attached again."""
        self._is_closing = True
        if self._task is not None and self.is_connected:
            # The leader ends the stream when it has read this.
            self._send(replica_pb2.FrontEndFrame(goodbye=replica_pb2.Goodbye()))
            await asyncio.wait({self._task}, timeout=GOODBYE_TIMEOUT_S)
        await self.retire()
        if self._channel is not None:
            await self._channel.close()

    async def retire(self) -> None:
        """This life of the leader is over: live streams end with ConnectionLost, and nothing is attached again, also
        where another leader listens at the same address."""
        self._is_closing = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._detached(ConnectionLost(f"the client of the replica at {self.address} was closed"))

    @property
    def is_connected(self) -> bool:
        return self._attached.is_set()

    @property
    def state(self) -> ReplicaState:
        """What the last ``info`` said; STARTING until the leader was reached, FAILED while the stream is broken."""
        return self._last_state

    @property
    def incarnation(self) -> int:
        """Names the life of the leader that was attached last."""
        return self._incarnation

    @property
    def num_live(self) -> int:
        """Requests that run over this client."""
        return len(self._streams)

    def _note(self, info: ReplicaInfo) -> ReplicaInfo:
        if self.is_connected:
            self._last_state = info.state
        return info

    def generate(self, request: Request, keep: Keep | None = None) -> AsyncGenerator[Output, None]:
        """Runs the request; the last output has a finish reason. A slow reader gets several steps' tokens at once.

        Closing the iterator before that (``aclose``, or cancelling the task that reads it) aborts the request; but
        where its client may come back, as ``keep`` says, the leader goes on for a grace time.

        Raises, when it is iterated:
            ConnectionLost: the stream to the leader broke. The request may still run.
            Unavailable: the stream to the leader was broken.
            Overloaded: max_streams requests run already.
            RemudaError: the request was refused, or the engine failed on it.
        """

        def submit(number: int) -> replica_pb2.FrontEndFrame:
            if len(request.token_ids) > MAX_REQUEST_TOKENS:
                raise ContextLengthExceeded(
                    f"there are {len(request.token_ids)} tokens; one message carries at most {MAX_REQUEST_TOKENS}",
                    "prompt",
                )
            message = convert.request_to_proto(number, request)
            message.window = WINDOW
            if keep is not None:
                message.resumable, message.client_request = True, keep.client_request
            return replica_pb2.FrontEndFrame(submit=message)

        return self._read(request.request_id, submit, len(request.token_ids) - request.num_prompt_tokens, keep)

    def resume(
        self, request_id: str, num_tokens: int, num_prompt_logprobs: int, keep: Keep | None = None
    ) -> AsyncGenerator[Output, None]:
        """What the leader has, or will have, of a request beyond this position. Otherwise as ``generate``.

        Raises, when it is iterated:
            UnknownStream: it does not have it (any more).
        """

        def resume(number: int) -> replica_pb2.FrontEndFrame:
            message = replica_pb2.Resume(
                stream=number,
                request_id=request_id,
                num_tokens=num_tokens,
                num_prompt_logprobs=num_prompt_logprobs,
                window=WINDOW,
            )
            return replica_pb2.FrontEndFrame(resume=message)

        return self._read(request_id, resume, num_tokens, keep)

    def abandon(self, request_id: str, even_if_read: bool = False) -> None:
        """Nobody waits for this request, which was lost with the connection and may still run there. ``even_if_read``:
        by another front end."""
        if self.is_connected:
            abort = replica_pb2.AbortRequest(request_id=request_id, even_if_read=even_if_read)
            self._send(replica_pb2.FrontEndFrame(abort=abort))
        else:
            self._abandoned.append(request_id)

    def release(self, error: RemudaError) -> None:
        """Everything that runs over this client ends here with ``error``, and at the leader."""
        for number, buffer in list(self._streams.items()):
            self._give_up(number, buffer, keep=False)
            buffer.fail(error)
            buffer.wake()

    async def _read(
        self, request_id: str, frame_of: Callable[[int], replica_pb2.FrontEndFrame], num_taken: int, keep: Keep | None
    ) -> AsyncGenerator[Output, None]:
        """Opens a stream and reads it to its end, granting credit as the reader takes what came."""
        number, buffer = self._open(request_id, frame_of)
        credit = num_taken + WINDOW
        try:
            while True:
                output = await buffer.get()
                yield output
                if output.finish_reason is not None:
                    return
                num_taken += len(output.token_ids)
                if credit - num_taken < WINDOW // 2:
                    credit = num_taken + WINDOW
                    self._grant(number, buffer, credit)
        finally:
            self._give_up(number, buffer, keep is not None and keep.is_wanted)

    def _open(self, request_id: str, frame_of: Callable[[int], replica_pb2.FrontEndFrame]) -> tuple[int, StreamBuffer]:
        if not self.is_connected:
            raise self._last_error
        if max(len(self._streams), len(self._outbox)) >= self._max_streams:
            raise Overloaded(f"{self._max_streams} requests run over this connection already")
        number = next(self._stream_numbers) % 2**32
        frame = frame_of(number)
        buffer = self._streams[number] = StreamBuffer(request_id)
        self._request_ids[number] = request_id
        self._send(frame)
        return number, buffer

    def _grant(self, number: int, buffer: StreamBuffer, position: int) -> None:
        if self._streams.get(number) is buffer:
            self._send(replica_pb2.FrontEndFrame(credit=replica_pb2.Credit(stream=number, position=position)))

    def _give_up(self, number: int, buffer: StreamBuffer, keep: bool) -> None:
        """After the end there is nothing to give up: the stream was forgotten when its last frame came."""
        if self._streams.get(number) is buffer:
            self._forget(number)
            self._send(replica_pb2.FrontEndFrame(abort=replica_pb2.AbortRequest(stream=number, keep=keep)))

    def _forget(self, number: int) -> None:
        del self._streams[number]
        del self._request_ids[number]

    def _send(self, frame: replica_pb2.FrontEndFrame) -> None:
        self._outbox.append(frame)
        self._outbox_filled.set()

    async def _stay_attached(self) -> None:
        backoff_s = FIRST_BACKOFF_S
        while True:
            try:
                await self._attach()
                lost: RemudaError = Unavailable("the leader ended the stream")
            except grpc.aio.AioRpcError as error:
                lost = await self._reason(error)
            except ProtocolViolation as error:
                lost = error
            except Exception as error:  # noqa: BLE001  (a defect, but streams must end and later ones must work)
                _log.exception("the stream to the replica at %s failed in our own code", self.address)
                lost = ProtocolViolation(f"{type(error).__name__}: {error}")
            if self._is_closing:
                return
            if self.is_connected:
                _log.warning("lost the stream to the replica at %s: %s", self.address, lost)
                backoff_s = FIRST_BACKOFF_S
            self._detached(ConnectionLost(f"the connection to the replica at {self.address} is broken: {lost}"))
            if isinstance(lost, Unauthenticated):
                self._answered.set()
            await asyncio.sleep(backoff_s * self._random.uniform(0.5, 1.0))
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
            if self._tls is not None:
                await self._dial_again()

    async def _reason(self, error: grpc.aio.AioRpcError) -> RemudaError:
        """Why the stream ended. Where a write of ours crosses the leader's refusal, gRPC's library gives an error of
        its own (grpc/aio/_call.py, ``_write``) in place of what the leader said; a call of one message is told."""
        if error.code() is grpc.StatusCode.INTERNAL and error.details() == CROSSED:
            try:
                await self.info(REASON_TIMEOUT_S)
            except RemudaError as reason:
                return reason
        return error_from_rpc(error)

    async def _dial_again(self) -> None:
        """Certificates may have changed since; where they cannot be read now, with those from before."""
        try:
            channel, stub = self._dial()
        except InvalidOption as error:
            _log.warning("the cluster's certificate cannot be read: %s", error)
            return
        before, self._channel, self._stub = self._channel, channel, stub
        if before is not None:
            await before.close()

    def _detached(self, error: ConnectionLost) -> None:
        """Ends every live stream, once; what had not been sent yet is not sent any more."""
        if self.is_connected:
            self._last_state = ReplicaState.FAILED
        self._attached.clear()
        self._last_error = error
        self._outbox.clear()
        streams, self._streams, self._request_ids = self._streams, {}, {}
        self._pacer.close()
        for buffer in streams.values():
            buffer.fail(error)
            buffer.wake()
        self.on_change()

    async def _attach(self) -> None:
        """Attaches, and serves the stream until it ends."""
        assert self._stub is not None
        call: _AttachCall = self._stub.Attach(metadata=self._metadata)
        writer: asyncio.Task[None] | None = None
        try:
            hello = replica_pb2.AttachHello(front_end_id=self._front_end_id)
            await call.write(replica_pb2.FrontEndFrame(hello=hello))
            sequence = 0
            async for frame in call:
                if frame.sequence != sequence:
                    raise ProtocolViolation(f"frame {frame.sequence} came where {sequence} was due")
                if sequence == 0:
                    self._incarnation = frame.incarnation
                    self._last_state = ReplicaState.READY
                    self._attached.set()
                    self._answered.set()
                    while self._abandoned:
                        self.abandon(self._abandoned.popleft())
                    self.on_change()
                    writer = asyncio.create_task(self._write(call))
                elif frame.incarnation != self._incarnation:
                    raise ProtocolViolation(f"incarnation {frame.incarnation} writes on {self._incarnation}'s stream")
                sequence += 1
                self._distribute(frame)
        finally:
            if writer is not None:
                writer.cancel()
            call.cancel()

    async def _write(self, call: _AttachCall) -> None:
        try:
            while True:
                while self._outbox:
                    await call.write(self._outbox.popleft())
                self._outbox_filled.clear()
                await self._outbox_filled.wait()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # the stream is broken: the reader of the same call says why

    def _distribute(self, frame: replica_pb2.LeaderFrame) -> None:
        """Hands each stream its part of a frame."""
        try:
            parts = convert.frame_from_proto(frame, self._request_ids)
        except ValueError as error:
            raise ProtocolViolation(str(error)) from error
        streams, pacer = self._streams, self._pacer
        for number, output, failure in parts:
            buffer = streams[number]
            pacer.add(buffer)
            if failure is not None:
                self._forget(number)
                if output.token_ids:
                    buffer.put(_unfinished(output))
                buffer.fail(failure)
                continue
            if output.finish_reason is not None:
                self._forget(number)
            buffer.put(output)
        pacer.wake()


def _unfinished(output: Output) -> Output:
    """The tokens that came with an error, without the finish: the error itself is the end."""
    assert output.finish_reason is FinishReason.ERROR
    return Output(output.request_id, output.token_ids, logprobs=output.logprobs, prompt_logprobs=output.prompt_logprobs)


def _nothing() -> None:
    pass
