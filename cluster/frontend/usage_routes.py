"""/v1/usage: what tenants used."""

import re

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cluster.frontend.http_errors import JsonResponse
from cluster.frontend.service import Service
from cluster.identity.principal import current_principal
from engine.errors import InvalidRequest

MAX_DAYS = 366
_DAY = re.compile("[0-9]{4}-[0-9]{2}-[0-9]{2}")


class UsageApi:
    """Args:
    service: whose tenancy counts.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    def routes(self) -> list[Route]:
        return [Route("/v1/usage", self.usage)]

    async def usage(self, request: Request) -> Response:
        """``?tenant=NAME``, ``?day=YYYY-MM-DD`` (may be repeated). Raises InvalidRequest, PermissionDenied."""
        days = request.query_params.getlist("day")
        if len(days) > MAX_DAYS or not all(map(_DAY.fullmatch, days)):
            raise InvalidRequest(f"day must be YYYY-MM-DD, at most {MAX_DAYS} times", "day")
        tenant = request.query_params.get("tenant")
        totals = await self._service.tenancy.usage(current_principal(), tenant, days or None)
        return JsonResponse({"object": "list", "data": [msgspec.to_builtins(total) for total in totals]})
