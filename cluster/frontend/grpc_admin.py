"""remuda.v1.Admin: what ``remuda status``, ``remuda drain`` and ``remuda adapters`` talk to."""

from collections.abc import AsyncIterator

from cluster.frontend.grpc_stream import Context
from cluster.frontend.http_errors import log_defect
from cluster.frontend.server_status import server_status
from cluster.frontend.service import Service
from cluster.rpc.generated.remuda.v1 import admin_pb2, admin_pb2_grpc, replica_pb2
from cluster.rpc.replica_info import adapter_to_proto, replica_info_to_proto
from cluster.rpc.status import abort


class AdminServicer(admin_pb2_grpc.AdminServicer):
    """Args:
    service: for its replicas and its live requests.
    version: of this software.
    """

    def __init__(self, service: Service, version: str) -> None:
        self._service = service
        self._version = version

    async def GetStatus(self, request: admin_pb2.GetStatusRequest, context: Context) -> admin_pb2.GetStatusResponse:
        try:
            status = server_status(self._service, self._version)
            return admin_pb2.GetStatusResponse(
                model=status.model,
                draining=status.draining,
                replicas=map(replica_info_to_proto, status.replicas),
                num_live_requests=status.num_live_requests,
                version=status.version,
                num_generated_tokens=status.num_generated_tokens,
            )
        except Exception as error:  # noqa: BLE001  whatever it is, the client gets a status
            log_defect(error)
            await abort(context, error)

    async def Drain(self, request: admin_pb2.DrainRequest, context: Context) -> admin_pb2.DrainResponse:
        """One replica takes no more work; or, with no name, this front end takes none for any."""
        try:
            if request.replica:
                await self._service.backend.drain(request.replica)
            else:
                self._service.admission.close()
            return admin_pb2.DrainResponse(num_live_requests=self._service.admission.num_requests)
        except Exception as error:  # noqa: BLE001  as above
            log_defect(error)
            await abort(context, error)

    async def ListAdapters(
        self, request: admin_pb2.ListAdaptersRequest, context: Context
    ) -> admin_pb2.ListAdaptersResponse:
        try:
            return admin_pb2.ListAdaptersResponse(adapters=map(adapter_to_proto, self._service.adapters.loaded()))
        except Exception as error:  # noqa: BLE001  as above
            log_defect(error)
            await abort(context, error)

    async def LoadAdapter(self, request: replica_pb2.LoadAdapterRequest, context: Context) -> replica_pb2.Adapter:
        try:
            return adapter_to_proto(await self._service.adapters.load(request.name, request.path))
        except Exception as error:  # noqa: BLE001  as above
            log_defect(error)
            await abort(context, error)

    async def DumpRecord(
        self, request: admin_pb2.DumpReplicaRecordRequest, context: Context
    ) -> AsyncIterator[replica_pb2.RecordPart]:
        try:
            async for part in self._service.backend.dump(request.replica):
                yield replica_pb2.RecordPart(data=part)
        except Exception as error:  # noqa: BLE001  as above
            log_defect(error)
            await abort(context, error)

    async def UnloadAdapter(
        self, request: replica_pb2.UnloadAdapterRequest, context: Context
    ) -> replica_pb2.UnloadAdapterResponse:
        try:
            await self._service.adapters.unload(request.name)
            return replica_pb2.UnloadAdapterResponse()
        except Exception as error:  # noqa: BLE001  as above
            log_defect(error)
            await abort(context, error)
