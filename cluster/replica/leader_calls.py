"""What a front end asks a leader beside the stream of requests."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import grpc

from cluster.errors import Unavailable
from cluster.rpc import replica_info
from cluster.rpc.generated.remuda.v1 import replica_pb2, replica_pb2_grpc
from cluster.rpc.shared_secret import secret_metadata
from cluster.rpc.status import error_from_rpc
from cluster.types import ReplicaInfo
from engine.errors import RemudaError
from engine.request import AdapterInfo

ADAPTER_TIMEOUT_S = 900.0
"""Loading waits for disks, unloading for requests."""
DUMP_TIMEOUT_S = 60.0

_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class Found:
    """What a leader has of one client's request: ids of its sequences, and what the front end had said of it."""

    request_ids: tuple[str, ...]
    client_request: bytes
    incarnation: int


class LeaderCalls:
    """Args:
    address: host:port of the leader.
    secret: what the leader asks its callers for.
    """

    def __init__(self, address: str, secret: str) -> None:
        self.address = address
        self._metadata = secret_metadata(secret)
        self._stub: replica_pb2_grpc.ReplicaAsyncStub | None = None
        self._last_error: RemudaError = Unavailable(f"the replica at {address} was not reached yet")

    async def info(self, timeout_s: float = 5.0) -> ReplicaInfo:
        """Asks the leader. Raises Unavailable, or DeadlineExceeded where it is silent."""
        request = replica_pb2.GetInfoRequest()
        answer = await self._call(lambda stub: stub.GetInfo(request, timeout=timeout_s, metadata=self._metadata))
        return self._note(replica_info.replica_info_from_proto(answer))

    async def drain(self, timeout_s: float = 5.0) -> ReplicaInfo:
        """Tells the leader to refuse new requests. Raises as ``info`` does."""
        request = replica_pb2.DrainReplicaRequest()
        answer = await self._call(lambda stub: stub.Drain(request, timeout=timeout_s, metadata=self._metadata))
        return self._note(replica_info.replica_info_from_proto(answer))

    async def load_adapter(self, name: str, path: str, timeout_s: float = ADAPTER_TIMEOUT_S) -> AdapterInfo:
        """On all ranks of this replica, or on none. Raises AdapterError, and as ``info`` does."""
        request = replica_pb2.LoadAdapterRequest(name=name, path=path)
        answer = await self._call(lambda stub: stub.LoadAdapter(request, timeout=timeout_s, metadata=self._metadata))
        return replica_info.adapter_from_proto(answer)

    async def unload_adapter(self, name: str, timeout_s: float = ADAPTER_TIMEOUT_S) -> None:
        """Waits for the requests that use it. Raises AdapterError, and as ``info`` does."""
        request = replica_pb2.UnloadAdapterRequest(name=name)
        await self._call(lambda stub: stub.UnloadAdapter(request, timeout=timeout_s, metadata=self._metadata))

    async def find(self, call_id: str, timeout_s: float = 5.0) -> Found:
        """What the leader has of a client's request. Raises UnknownStream, and as ``info`` does."""
        request = replica_pb2.FindRequestRequest(call_id=call_id)
        answer = await self._call(lambda stub: stub.FindRequest(request, timeout=timeout_s, metadata=self._metadata))
        return Found(tuple(answer.request_ids), answer.client_request, answer.incarnation)

    async def dump(self) -> AsyncGenerator[bytes, None]:
        """The replica's flight record, in parts. Raises as ``info`` does."""
        if self._stub is None:
            raise self._last_error
        request = replica_pb2.DumpRecordRequest()
        try:
            async for part in self._stub.DumpRecord(request, timeout=DUMP_TIMEOUT_S, metadata=self._metadata):
                yield part.data
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error

    async def _call(self, ask: Callable[["replica_pb2_grpc.ReplicaAsyncStub"], Awaitable[_Answer]]) -> _Answer:
        if self._stub is None:
            raise self._last_error
        try:
            return await ask(self._stub)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error

    def _note(self, info: ReplicaInfo) -> ReplicaInfo:
        return info
