"""``remuda frontend``: HTTP and gRPC for leaders that something else has started."""

import asyncio
import signal
import uuid
from pathlib import Path
from typing import Annotated

import typer
import uvloop
from rich.console import Console

from cluster.cli import options, serve_options
from cluster.frontend.app import FrontEnd, FrontEndConfig
from cluster.frontend.fleet import Fleet
from cluster.identity.config import load_security
from cluster.replica.client import ReplicaClient
from cluster.replica.model_source import ModelSource
from engine.errors import InvalidOption, RemudaError

EXAMPLES = "Example: remuda frontend remuda-tiny --leaders r0=10.0.0.1:7000,r1=10.0.0.2:7000 --secret-file SECRET"
RETRY_INTERVAL_S = 1.0


def frontend(
    model: Annotated[str, typer.Argument(help="The model that the leaders serve, as for remuda serve.")],
    leaders: Annotated[str, typer.Option(help="NAME=HOST:PORT of each leader, with commas between them.")],
    secret_file: Annotated[Path | None, typer.Option(help="File with the secret that the leaders ask for.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="HTTP port; 0 takes a free one.")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="gRPC port; 0 takes a free one.")] = 50051,
    served_model_name: Annotated[str | None, typer.Option(help="The name that clients ask for.")] = None,
    api_key_file: serve_options.ApiKeyFile = None,
    security_file: serve_options.SecurityFile = None,
    insecure: serve_options.Insecure = None,
    drain_timeout: Annotated[float, typer.Option(help="Seconds that running requests get at the end.")] = 30.0,
) -> None:
    """Serve clients for leaders that run already, beside other front ends.

    Any front end can go on with a resumable request that another one began. It stops at SIGTERM; leaders go on.
    """
    config = FrontEndConfig(
        name=served_model_name or model,
        model_path=ModelSource(model, None).directory(),
        host=host,
        port=port,
        grpc_port=grpc_port,
        security=load_security(security_file, api_key_file),
        insecure=bool(insecure),
    )
    secret = options.read_secret(secret_file)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(config, parse_leaders(leaders), secret, drain_timeout))


def parse_leaders(text: str) -> dict[str, str]:
    """Name → host:port. Raises InvalidOption."""
    found: dict[str, str] = {}
    for part in text.split(","):
        name, equals, address = part.strip().partition("=")
        host, _, port = address.rpartition(":")
        if not (name and equals and host and port.isdecimal()) or name in found:
            raise InvalidOption(f"--leaders {text}: write NAME=HOST:PORT,NAME=HOST:PORT, each name once")
        found[name] = address
    return found


async def _serve(config: FrontEndConfig, leaders: dict[str, str], secret: str, drain_timeout_s: float) -> None:
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    fleet = Fleet()
    front_end = FrontEnd(config, fleet)
    await front_end.start()
    console.print(front_end.addresses)
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    front_end_id = f"front-end-{uuid.uuid4().hex[:12]}"
    joining = [
        asyncio.create_task(_join(fleet, name, ReplicaClient(address, front_end_id, secret), console))
        for name, address in leaders.items()
    ]
    await stop.wait()
    for task in joining:
        task.cancel()
    await asyncio.gather(*joining, return_exceptions=True)
    await front_end.stop(drain_timeout_s)
    await fleet.close()


async def _join(fleet: Fleet, name: str, client: ReplicaClient, console: Console) -> None:
    """However long the leader takes to appear."""
    while True:
        try:
            await fleet.add(name, client)
        except RemudaError as error:
            console.print(f"{name}: {error}; trying again", style="yellow", markup=False)
            await asyncio.sleep(RETRY_INTERVAL_S)
        else:
            console.print(f"{name} at {client.address} has joined", markup=False)
            return
