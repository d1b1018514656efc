"""The rpcs of remuda.v1.Replica, around a leader's server."""

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc

from cluster.errors import Unavailable, UnknownStream
from cluster.replica.attachment import Attachment
from cluster.rpc import replica_info, status
from cluster.rpc.generated.remuda.v1 import replica_pb2, replica_pb2_grpc
from engine.errors import InvalidRequest, RemudaError

if TYPE_CHECKING:
    from cluster.replica.server import LeaderServer

Context = grpc.aio.ServicerContext[Any, Any]


class ReplicaServicer(replica_pb2_grpc.ReplicaServicer):
    """The rpcs of remuda.v1.Replica."""

    def __init__(self, leader: "LeaderServer") -> None:
        self._leader = leader

    async def Attach(  # type: ignore[override]
        self, request_iterator: AsyncIterator[replica_pb2.FrontEndFrame], context: Context
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
        except InvalidRequest:
            self._leader.give_up_all(attachment)
            raise
        finally:
            attachment.close()

    async def FindRequest(
        self, request: replica_pb2.FindRequestRequest, context: Context
    ) -> replica_pb2.FindRequestResponse:
        await self._leader.authenticate(context)
        try:
            return self._leader.find(request.call_id)
        except (UnknownStream, Unavailable) as error:
            await status.abort(context, error)

    async def GetInfo(self, request: replica_pb2.GetInfoRequest, context: Context) -> replica_pb2.ReplicaInfo:
        await self._leader.authenticate(context)
        return replica_info.replica_info_to_proto(self._leader.info())

    async def Drain(self, request: replica_pb2.DrainReplicaRequest, context: Context) -> replica_pb2.ReplicaInfo:
        await self._leader.authenticate(context)
        await self._leader.drain()
        return replica_info.replica_info_to_proto(self._leader.info())

    async def DumpRecord(
        self, request: replica_pb2.DumpRecordRequest, context: Context
    ) -> AsyncIterator[replica_pb2.RecordPart]:
        await self._leader.authenticate(context)
        parts = self._leader.dump()
        # In a thread: streams must not wait until the record has been made readable.
        while part := await asyncio.to_thread(next, parts, b""):
            yield replica_pb2.RecordPart(data=part)

    async def LoadAdapter(self, request: replica_pb2.LoadAdapterRequest, context: Context) -> replica_pb2.Adapter:
        await self._leader.authenticate(context)
        try:
            loaded = await asyncio.wrap_future(self._leader.load_adapter(request.name, request.path))
        except RemudaError as error:
            await status.abort(context, error)
        return replica_info.adapter_to_proto(loaded)

    async def UnloadAdapter(
        self, request: replica_pb2.UnloadAdapterRequest, context: Context
    ) -> replica_pb2.UnloadAdapterResponse:
        await self._leader.authenticate(context)
        try:
            await asyncio.wrap_future(self._leader.unload_adapter(request.name))
        except RemudaError as error:
            await status.abort(context, error)
        return replica_pb2.UnloadAdapterResponse()
