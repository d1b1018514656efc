"""A front end's side of the multiplexed stream to one replica's leader."""

import asyncio
import itertools
import logging
import random
from collections import deque
from collections.abc import AsyncGenerator

import grpc

from cluster.errors import Unavailable
from cluster.replica.stream_buffer import StreamBuffer
from cluster.replica.wake_pacer import WakePacer
from cluster.rpc import convert
from cluster.rpc.channel import open_channel
from cluster.rpc.generated.remuda.v1 import replica_pb2, replica_pb2_grpc
from cluster.rpc.shared_secret import secret_metadata
from cluster.rpc.status import error_from_rpc
from cluster.types import ReplicaInfo, ReplicaState
from engine.errors import ContextLengthExceeded, Overloaded, ProtocolViolation, RemudaError
from engine.request import AdapterInfo, FinishReason, Output, Request

_log = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 2.0
ADAPTER_TIMEOUT_S = 900.0
"""Loading waits for disks, unloading for requests."""
MAX_REQUEST_TOKENS = 10_000_000
"""At 5 bytes each still below channel.MAX_MESSAGE_BYTES: a message over it would break the stream for all."""

_AttachCall = grpc.aio.StreamStreamCall[replica_pb2.FrontEndFrame, replica_pb2.LeaderFrame]


class ReplicaClient:
    """Requests to one replica, all over one stream, which is attached again whenever it breaks.

    Args:
        address: host:port of the leader.
        front_end_id: names this front end in the leader's log.
        secret: what the leader asks its callers for.
        credentials: for TLS; None speaks plain text.
        max_streams: most requests that may run at once over this client.
        randomness: spreads the times at which several front ends try to attach again.
    """

    def __init__(
        self,
        address: str,
        front_end_id: str,
        secret: str = "",
        credentials: grpc.ChannelCredentials | None = None,
        max_streams: int = 4096,
        randomness: random.Random | None = None,
    ) -> None:
        self.address = address
        self._front_end_id = front_end_id
        self._metadata = secret_metadata(secret)
        self._credentials = credentials
        self._max_streams = max_streams
        self._random = randomness or random.Random()
        self._channel: grpc.aio.Channel | None = None
        self._stub: replica_pb2_grpc.ReplicaAsyncStub | None = None
        self._task: asyncio.Task[None] | None = None
        self._attached = asyncio.Event()
        self._incarnation = 0
        self._streams: dict[int, StreamBuffer] = {}
        self._pacer = WakePacer()
        self._request_ids: dict[int, str] = {}
        self._stream_numbers = itertools.count()
        self._outbox: deque[replica_pb2.FrontEndFrame] = deque()
        self._outbox_filled = asyncio.Event()
        self._last_state = ReplicaState.STARTING
        self._last_error: RemudaError = Unavailable(f"the replica at {address} was not reached yet")

    async def connect(self, timeout_s: float = 10.0) -> None:
        """Attaches for the first time. After a failure it goes on trying in the background until ``close``.

        Raises:
            Unavailable: the leader did not answer in time.
        """
        if self._task is None:
            self._channel, self._stub = self._dial()
            self._task = asyncio.create_task(self._stay_attached())
        try:
            await asyncio.wait_for(self._attached.wait(), timeout_s)
        except TimeoutError:
            raise Unavailable(f"no leader answers at {self.address}: {self._last_error}") from None

    def _dial(self) -> "tuple[grpc.aio.Channel, replica_pb2_grpc.ReplicaAsyncStub]":
        channel = open_channel(self.address, self._credentials)
        return channel, replica_pb2_grpc.ReplicaStub(channel)

    async def close(self) -> None:
        """Live streams end with Unavailable. Nothing is attached again."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._detached(Unavailable(f"the client of the replica at {self.address} was closed"))
        if self._channel is not None:
            await self._channel.close()

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

    async def info(self, timeout_s: float = 5.0) -> ReplicaInfo:
        """Asks the leader. Raises Unavailable, or DeadlineExceeded where it is silent."""
        if self._stub is None:
            raise self._last_error
        try:
            answer = await self._stub.GetInfo(replica_pb2.GetInfoRequest(), timeout=timeout_s, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        return self._note(convert.replica_info_from_proto(answer))

    async def drain(self, timeout_s: float = 5.0) -> ReplicaInfo:
        """Tells the leader to refuse new requests. Raises as ``info`` does."""
        if self._stub is None:
            raise self._last_error
        try:
            answer = await self._stub.Drain(
                replica_pb2.DrainReplicaRequest(), timeout=timeout_s, metadata=self._metadata
            )
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        return self._note(convert.replica_info_from_proto(answer))

    async def load_adapter(self, name: str, path: str, timeout_s: float = ADAPTER_TIMEOUT_S) -> AdapterInfo:
        """On all ranks of this replica, or on none. Raises AdapterError, and as ``info`` does."""
        if self._stub is None:
            raise self._last_error
        request = replica_pb2.LoadAdapterRequest(name=name, path=path)
        try:
            answer = await self._stub.LoadAdapter(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        return convert.adapter_from_proto(answer)

    async def unload_adapter(self, name: str, timeout_s: float = ADAPTER_TIMEOUT_S) -> None:
        """Waits for the requests that use it. Raises AdapterError, and as ``info`` does."""
        if self._stub is None:
            raise self._last_error
        request = replica_pb2.UnloadAdapterRequest(name=name)
        try:
            await self._stub.UnloadAdapter(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error

    def _note(self, info: ReplicaInfo) -> ReplicaInfo:
        if self.is_connected:
            self._last_state = info.state
        return info

    async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        """Runs the request; the last output has a finish reason. A slow reader gets several steps' tokens at once.

        Closing the iterator before that (``aclose``, or cancelling the task that reads it) aborts the request.

        Raises:
            Unavailable: the stream to the leader is, or was, broken.
            Overloaded: max_streams requests run already.
            RemudaError: the request was refused, or the engine failed on it.
        """
        number, buffer = self._open(request)
        try:
            while True:
                output = await buffer.get()
                yield output
                if output.finish_reason is not None:
                    return
        finally:
            self._give_up(number, buffer)

    def _open(self, request: Request) -> tuple[int, StreamBuffer]:
        if not self.is_connected:
            raise self._last_error
        if max(len(self._streams), len(self._outbox)) >= self._max_streams:
            raise Overloaded(f"{self._max_streams} requests run over this connection already")
        if len(request.token_ids) > MAX_REQUEST_TOKENS:
            raise ContextLengthExceeded(
                f"the prompt has {len(request.token_ids)} tokens; one message carries at most {MAX_REQUEST_TOKENS}",
                "prompt",
            )
        number = next(self._stream_numbers) % 2**32
        submit = convert.request_to_proto(number, request)
        buffer = self._streams[number] = StreamBuffer(request.request_id)
        self._request_ids[number] = request.request_id
        self._send(replica_pb2.FrontEndFrame(submit=submit))
        return number, buffer

    def _give_up(self, number: int, buffer: StreamBuffer) -> None:
        """After the end there is nothing to give up: the stream was forgotten when its last frame came."""
        if self._streams.get(number) is buffer:
            self._forget(number)
            self._send(replica_pb2.FrontEndFrame(abort=replica_pb2.AbortRequest(stream=number)))

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
                lost = error_from_rpc(error)
            except ProtocolViolation as error:
                lost = error
            except Exception as error:  # noqa: BLE001  (a defect, but streams must end and later ones must work)
                _log.exception("the stream to the replica at %s failed in our own code", self.address)
                lost = ProtocolViolation(f"{type(error).__name__}: {error}")
            if self.is_connected:
                _log.warning("lost the stream to the replica at %s: %s", self.address, lost)
                backoff_s = FIRST_BACKOFF_S
            self._detached(Unavailable(f"the connection to the replica at {self.address} is broken: {lost}"))
            await asyncio.sleep(backoff_s * self._random.uniform(0.5, 1.0))
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    def _detached(self, error: Unavailable) -> None:
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
