"""What this front end says of itself and its replicas: for remuda.v1.Admin, /v1/status and the console."""

import importlib.metadata

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cluster.frontend.http_errors import JsonResponse
from cluster.frontend.service import Service
from cluster.types import ServerStatus


def server_status(service: Service, version: str) -> ServerStatus:
    """Replicas are as they last said of themselves: half a second ago or, where nothing runs, two."""
    return ServerStatus(
        model=service.name,
        version=version,
        draining=service.admission.is_closed,
        num_live_requests=service.admission.num_requests,
        num_generated_tokens=service.num_generated_tokens,
        replicas=tuple(service.backend.replicas()),
    )


class StatusApi:
    """Args:
    service: whose status is shown.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._version = importlib.metadata.version("remuda")

    def routes(self) -> list[Route]:
        return [Route("/v1/status", self.status)]

    async def status(self, request: Request) -> Response:
        """What ``remuda status --json`` prints."""
        return JsonResponse(server_status(self._service, self._version).as_object())
