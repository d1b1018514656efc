"""Outside the HTTP application: every response says what its tenant's limits leave."""

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.tenants.report import LimitReport, reporting


class LimitHeaders:
    """Args:
    app: what notes limits in ``current_report``.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        report = LimitReport()

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(report.headers())
            await send(message)

        with reporting(report):
            await self._app(scope, receive, send_with_limits)
