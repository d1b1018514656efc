"""A front end with keys and tenants, and what its clients send."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from cluster.cli.main import app
from cluster.identity.config import SecurityConfig
from cluster.tenants.tenancy import TenancyConfig
from engine.request import Output, Request
from tests.frontend.scripted import Script, says
from tests.frontend.servers import Served, served


def key_of(folder: Path, tenant: str, *options: str) -> str:
    """A new key, in the file that ``with_tenants`` serves with."""
    arguments = ["keys", "create", "--file", str(folder / "keys"), "--json", "--tenant", tenant, *options]
    return str(json.loads(CliRunner().invoke(app, arguments).stdout)["key"])


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def metadata(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


@asynccontextmanager
async def with_tenants(
    folder: Path, tenants: str, script: Script | None = None, max_live_sequences: int = 1024, **tenancy: Any
) -> AsyncIterator[Served]:
    """``tenants``: the file's text."""
    (folder / "tenants.yaml").write_text(tenants)
    config = TenancyConfig(folder / "tenants.yaml", **tenancy)
    security = SecurityConfig.model_validate({"api_keys": {"file": folder / "keys"}})
    async with served(
        script or says([300, 301, 302]), security=security, tenancy=config, max_live_sequences=max_live_sequences
    ) as one:
        yield one


def endless(request: Request) -> AsyncGenerator[Output, None]:
    """Five tokens, and no end."""

    async def outputs() -> AsyncGenerator[Output, None]:
        for token_id in range(300, 305):
            yield Output(request.request_id, [token_id])
        await asyncio.Event().wait()

    return outputs()
