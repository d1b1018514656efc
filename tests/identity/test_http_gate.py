"""What is behind the gate sees neither secrets nor what a client says of its own identity."""

from pathlib import Path
from typing import Any

import httpx
from starlette.types import Receive, Scope, Send

from cluster.frontend.http_gate import Gate
from cluster.frontend.metrics import Metrics
from cluster.identity.authenticator import IDENTITY_HEADERS, make_authenticator
from cluster.identity.config import SecurityConfig


async def headers_inside(security: SecurityConfig, headers: list[tuple[str, str]]) -> tuple[int, set[str]]:
    """The status, and the names that came through."""
    seen: set[str] = set()

    async def inside(scope: Scope, receive: Receive, send: Send) -> None:
        seen.update(name.decode() for name, _ in scope["headers"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    authenticator = make_authenticator(security, lambda: 0.0, lambda: 0.0, lambda size: b"x" * size)
    gate: Any = Gate(inside, authenticator, Metrics("m", lambda: []), frozenset())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(gate), base_url="http://x") as client:
        return (await client.get("/v1/models", headers=headers)).status_code, seen


async def test_identity_headers_end_at_the_gate(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("alpha-of-the-herd\n")
    claimed = [(name.title(), "Bearer alpha-of-the-herd") for name in sorted(IDENTITY_HEADERS)]
    for security in (SecurityConfig(), SecurityConfig.model_validate({"api_keys": {"file": tmp_path / "keys"}})):
        status, seen = await headers_inside(security, [*claimed, ("x-session-id", "s"), ("traceparent", "t")])
        assert status == 200
        assert not seen & IDENTITY_HEADERS and {"x-session-id", "traceparent", "host"} <= seen
