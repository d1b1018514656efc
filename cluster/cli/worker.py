"""``remuda worker``: one more host for a replica whose engine runs elsewhere."""

import asyncio
import signal
import threading
from typing import Annotated

import typer
from rich.console import Console

from cluster.cli import group_options as options
from cluster.config import Device
from cluster.control.group_host import GroupHost
from cluster.control.node_topology import parse_topology
from cluster.control.ray_settings import parse_address
from cluster.frontend.probes import serve_probes
from cluster.rpc.shared_secret import required_secret
from engine.errors import RemudaError

EXAMPLES = "Example: remuda worker --head 10.0.0.1:6379 --node-ip 10.0.0.2 --devices 8 --secret-file SECRET"


def worker(
    head: Annotated[str, typer.Option(help="HOST:PORT of remuda engine's --ray-port.")],
    node_ip: options.NodeIp,
    secret_file: options.GroupSecret,
    devices: options.Devices = 1,
    device: Annotated[Device, typer.Option(help="cpu or cuda.")] = Device.CUDA,
    ray_token_file: options.RayTokenFile = None,
    health_port: options.HealthPort = 0,
    topology: options.Topology = "",
) -> None:
    """Hold ranks of the replica whose remuda engine runs at --head; wait for it as long as it takes.

    /livez says whether the host looks after its membership, /readyz whether it is a member of the group. It ends at
    SIGTERM with status 0, and with 1 when it is no member any more: whoever started it starts it anew.
    """
    parse_address(head)
    levels = parse_topology(topology)
    host = GroupHost(node_ip, device, devices, required_secret(secret_file), ray_token_file, levels)
    raise typer.Exit(asyncio.run(_run(host, head, health_port)))


async def _run(host: GroupHost, head: str, health_port: int) -> int:
    # Only where it is needed: importing Ray takes a second, which the other commands would pay too.
    from cluster.control.group_member import Membership, stay

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    stop, membership = threading.Event(), Membership()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)

    def tell(text: str) -> None:
        console.print(text, markup=False)

    async with serve_probes(host.node_ip, health_port, membership):
        try:
            await asyncio.to_thread(stay, host, head, stop, tell, membership)
        except RemudaError as error:
            tell(f"remuda: {error}")
            return 1
    return 0
