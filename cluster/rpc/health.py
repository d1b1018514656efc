"""What every gRPC server of ours has beside its own services: grpc.health.v1 and reflection."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

MAX_WATCHES = 1_000
MAX_WATCHES_A_CONNECTION = 100
"""Many clients may share the connection of a proxy."""
_MAX_NAME_CHARS = 256

_Context = grpc.aio.ServicerContext[Any, Any]


class _Watched(health.aio.HealthServicer):  # type: ignore[misc]  # its package has no types
    """Everybody may call ``Watch``, and it has no end: so the calls that are open are counted."""

    def __init__(self, max_watches: int) -> None:
        super().__init__()
        self._max_watches = max_watches
        self._watches_by_peer: Counter[str] = Counter()

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: _Context) -> None:
        if len(request.service) > _MAX_NAME_CHARS:
            message = f"a service's name has at most {_MAX_NAME_CHARS} characters"
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, message)
        peer = context.peer()
        num_own = self._watches_by_peer[peer]
        if num_own >= MAX_WATCHES_A_CONNECTION or self._watches_by_peer.total() >= self._max_watches:
            message = "too many calls of Watch are open; end some, or call Check"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, message)
        self._watches_by_peer[peer] += 1
        try:
            await super().Watch(request, context)
        finally:
            self._watches_by_peer[peer] -= 1
            if not self._watches_by_peer[peer]:
                del self._watches_by_peer[peer]


class Health:
    """The state that grpc.health.v1 reports for each named service and for the server as a whole ("").
    ``max_watches``: calls of ``Watch`` that may be open at a time."""

    def __init__(self, service_names: Sequence[str], max_watches: int = MAX_WATCHES) -> None:
        self._names = ("", *service_names)
        self.servicer = _Watched(max_watches)

    async def set_serving(self, is_serving: bool) -> None:
        kind = health_pb2.HealthCheckResponse
        for name in self._names:
            await self.servicer.set(name, kind.SERVING if is_serving else kind.NOT_SERVING)


async def add_health_and_reflection(
    server: grpc.aio.Server, service_names: Sequence[str], max_watches: int = MAX_WATCHES
) -> Health:
    """Before ``server.start()``. Health begins as not serving."""
    state = Health(service_names, max_watches)
    health_pb2_grpc.add_HealthServicer_to_server(state.servicer, server)
    reflection.enable_server_reflection((*service_names, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    await state.set_serving(False)
    return state
