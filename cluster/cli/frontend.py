"""``remuda frontend``: HTTP and gRPC for leaders that something else has started."""

import asyncio
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import uvloop
from rich.console import Console

from cluster.cli import serve_options
from cluster.cli.console import open_console
from cluster.cli.serve_run import front_end_config, new_front_end_id
from cluster.config import ServeConfig, load_serve_config
from cluster.frontend.app import FrontEnd, FrontEndConfig
from cluster.frontend.fleet import Fleet
from cluster.frontend.leader_set import LeaderSet
from cluster.identity.cluster_tls import ClusterTls
from cluster.k8s.endpoint_slices import ServiceName
from cluster.replica.client import ReplicaClient
from cluster.replica.heap import settle_heap
from cluster.replica.model_source import ModelSource
from cluster.rpc.shared_secret import read_secret
from cluster.telemetry.config import otlp_endpoint as chosen_endpoint
from cluster.telemetry.tracing import open_telemetry
from engine.config import GrammarBackend
from engine.errors import InvalidOption
from engine.request import Pooling

if TYPE_CHECKING:
    from cluster.k8s.leaders import KubernetesLeaders

EXAMPLES = (
    "Examples: remuda frontend remuda-tiny --leaders r0=10.0.0.1:7000,r1=10.0.0.2:7000 --secret-file SECRET | "
    "remuda frontend /models/Llama-3.1-70B --discover kubernetes:llm/llama-leaders --secret-file SECRET "
    "--request-timeout 3600"
)


def frontend(
    model: Annotated[str, typer.Argument(help="The model that the leaders serve, as for remuda serve.")],
    leaders: Annotated[
        str | None, typer.Option(help="NAME=HOST:PORT of each leader, with commas between them.")
    ] = None,
    discover: Annotated[
        str | None, typer.Option(metavar="kubernetes:NAMESPACE/SERVICE", help="Leaders are that Service's endpoints.")
    ] = None,
    watch_nodes: Annotated[
        bool, typer.Option("--watch-nodes", help="Prefer replicas whose Kubernetes nodes are not cordoned or tainted.")
    ] = False,
    secret_file: Annotated[Path | None, typer.Option(help="File with the secret that the leaders ask for.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="HTTP port; 0 takes a free one.")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="gRPC port; 0 takes a free one.")] = 50051,
    served_model_name: Annotated[str | None, typer.Option(help="The name that clients ask for.")] = None,
    pooling: Annotated[
        Pooling, typer.Option(help="Hidden states that embeddings are made of: the last, or all; the same everywhere.")
    ] = Pooling.LAST,
    guided_decoding_backend: Annotated[
        GrammarBackend, typer.Option(help="What follows grammars on the replicas; requests are checked by it too.")
    ] = GrammarBackend.LLGUIDANCE,
    lora_dir: serve_options.LoraDirectory = None,
    max_lora_rank: serve_options.MaxLoraRank = None,
    api_key_file: serve_options.ApiKeyFile = None,
    security_file: serve_options.SecurityFile = None,
    insecure: serve_options.Insecure = None,
    tenants: serve_options.Tenants = None,
    limits_store: serve_options.LimitsStore = None,
    limits_store_password_file: serve_options.LimitsStorePasswordFile = None,
    usage_log: serve_options.UsageLog = None,
    audit_log: serve_options.AuditLog = None,
    otlp_endpoint: serve_options.OtlpEndpoint = None,
    log_format: serve_options.LogFormat = None,
    request_timeout: serve_options.RequestTimeout = None,
    queue_timeout: serve_options.QueueTimeout = None,
    first_token_timeout: serve_options.FirstTokenTimeout = None,
    drain_timeout: serve_options.DrainTimeout = None,
) -> None:
    """Serve clients for leaders that run already, beside other front ends.

    Any front end can go on with a resumable request that another one began. It stops at SIGTERM; leaders go on.
    """
    given = locals()
    flags = {name: given[name] for name in ServeConfig.model_fields if name in given}
    shared = load_serve_config(flags, environment=False)
    console = open_console(shared.log_format, "remuda-frontend")
    endpoint = chosen_endpoint(otlp_endpoint)
    known = _source(leaders, discover, watch_nodes)
    config = front_end_config(shared, ModelSource(model, None).directory())
    secret = "" if secret_file is None else read_secret(secret_file)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(console, config, endpoint, known, watch_nodes, secret, shared.drain_timeout))


def _source(leaders: str | None, discover: str | None, watch_nodes: bool) -> dict[str, str] | ServiceName:
    """Raises InvalidOption."""
    if (leaders is None) == (discover is None):
        raise InvalidOption("say where the leaders are: either --leaders, or --discover in Kubernetes")
    if discover is not None:
        return ServiceName.parse(discover)
    if watch_nodes:
        raise InvalidOption("--watch-nodes goes with --discover: outside Kubernetes there are no nodes to watch")
    assert leaders is not None
    return parse_leaders(leaders)


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


async def _serve(
    console: Console,
    config: FrontEndConfig,
    endpoint: str | None,
    leaders: dict[str, str] | ServiceName,
    watch_nodes: bool,
    secret: str,
    drain_timeout_s: float,
) -> None:
    def tell(text: str) -> None:
        console.print(text, markup=False)

    tls = ClusterTls.of(config.security.cluster)
    front_end_id = new_front_end_id()
    telemetry = open_telemetry(endpoint, "remuda-frontend", front_end_id)
    fleet = Fleet(tracer=telemetry.tracer)
    front_end = FrontEnd(config, fleet, telemetry)
    await front_end.start()
    console.print(front_end.addresses)
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    known = LeaderSet(fleet, lambda address: ReplicaClient(address, front_end_id, secret, tls), tell)
    discovery: KubernetesLeaders | None = None
    if isinstance(leaders, ServiceName):
        # Only where it is needed: the kubernetes package takes a second to import.
        from cluster.k8s import leaders as kubernetes

        discovery = kubernetes.KubernetesLeaders(leaders, known.update, fleet.set_aside, watch_nodes)
        discovery.start()
    else:
        known.update(leaders)
    settle_heap()
    await stop.wait()
    if discovery is not None:
        discovery.stop()
    await front_end.stop(drain_timeout_s)
    await known.close()
    await fleet.close()
