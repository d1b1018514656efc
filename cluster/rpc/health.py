"""What every gRPC server of ours has beside its own services: grpc.health.v1 and reflection."""

from collections.abc import Sequence

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection


class Health:
    """The state that grpc.health.v1 reports for each named service and for the server as a whole ("")."""

    def __init__(self, service_names: Sequence[str]) -> None:
        self._names = ("", *service_names)
        self.servicer = health.aio.HealthServicer()

    async def set_serving(self, is_serving: bool) -> None:
        kind = health_pb2.HealthCheckResponse
        for name in self._names:
            await self.servicer.set(name, kind.SERVING if is_serving else kind.NOT_SERVING)


async def add_health_and_reflection(server: grpc.aio.Server, service_names: Sequence[str]) -> Health:
    """Before ``server.start()``. Health begins as not serving."""
    state = Health(service_names)
    health_pb2_grpc.add_HealthServicer_to_server(state.servicer, server)
    reflection.enable_server_reflection((*service_names, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    await state.set_serving(False)
    return state
