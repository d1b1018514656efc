"""A whole front end on free ports of 127.0.0.1, over a scripted backend, in the test's own event loop."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai

from cluster.frontend.app import FrontEnd, FrontEndConfig
from cluster.frontend.backend import Backend
from cluster.identity.config import load_security
from cluster.telemetry.tracing import Telemetry
from tests.frontend.scripted import Script, ScriptedBackend

TINY = Path(__file__).parents[2] / "engine" / "assets" / "remuda-tiny"


class Served:
    """A running front end and clients of it."""

    def __init__(self, front_end: FrontEnd, backend: Any, key: str | None) -> None:
        self.front_end = front_end
        self.backend = backend
        self.url = f"http://127.0.0.1:{front_end.port}"
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.AsyncClient(base_url=self.url, headers=headers, timeout=20, trust_env=False, verify=False)
        self.openai = openai.AsyncOpenAI(
            base_url=f"{self.url}/v1",
            api_key=key or "none",
            max_retries=0,
            http_client=httpx.AsyncClient(timeout=20, trust_env=False, verify=False),
        )
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{front_end.grpc_port}")


@asynccontextmanager
async def served(
    script: Script | Backend, key: str | None = None, api_key_file: Path | None = None, **changes: Any
) -> AsyncIterator[Served]:
    """``script`` may be a backend of its own. ``changes`` are fields of FrontEndConfig."""
    if api_key_file is not None:
        changes["security"] = load_security(None, api_key_file)
    backend = script if hasattr(script, "generate") else ScriptedBackend(script)
    async with serving_front_end(backend, key, **changes) as one:
        yield one


@asynccontextmanager
async def serving_front_end(
    backend: Backend, key: str | None = None, telemetry: Telemetry | None = None, **changes: Any
) -> AsyncIterator[Served]:
    """As ``served``, over any backend."""
    values: dict[str, Any] = {"name": "m", "model_path": TINY, "port": 0, "grpc_port": 0, **changes}
    front_end = FrontEnd(FrontEndConfig(**values), backend, telemetry)
    await front_end.start()
    one = Served(front_end, backend, key)
    try:
        yield one
    finally:
        await one.http.aclose()
        await one.openai.close()
        await one.channel.close()
        await front_end.stop()
