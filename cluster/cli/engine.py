"""``remuda engine``: one replica over a group of hosts, for front ends that run elsewhere."""

import asyncio
from typing import Annotated

import msgspec
import typer
import uvloop

from cluster.cli import group_options
from cluster.cli import serve_options as options
from cluster.cli.console import open_console
from cluster.cli.serve_run import Serving
from cluster.config import ServeConfig, load_serve_config
from cluster.control.group_host import GroupHost, head
from cluster.control.node_topology import parse_topology
from cluster.control.preflight import Preflight, local_device, preflight
from cluster.frontend.fleet import Fleet
from cluster.frontend.probes import EngineFront
from engine.errors import LayoutError

LEADER_PORT = 9052
"""Not one of those that Linux gives to outgoing connections (32768 and above): by the time that the leader listens,
this host's Ray and ranks have many of them."""
EXAMPLES = (
    "Example: remuda engine /models/Llama-3.1-405B --tp 8 --pp 2 --hosts 2 --devices 8 --node-ip 10.0.0.1 "
    "--secret-file SECRET (and remuda worker --head 10.0.0.1:6379 … on the other host)"
)


def engine(
    node_ip: group_options.NodeIp,
    secret_file: group_options.GroupSecret,
    model: options.ModelArgument = None,
    hosts: Annotated[int, typer.Option(min=1, help="Hosts of the group, this one included.")] = 1,
    devices: group_options.Devices = 1,
    host_wait: Annotated[
        float, typer.Option(help="Seconds that a lost host may take to be replaced; the others keep their weights.")
    ] = 600.0,
    ray_port: Annotated[int, typer.Option(help="Where this host's Ray head listens for the others.")] = 6379,
    leader_port: Annotated[int, typer.Option(help="Where the leader listens for front ends.")] = LEADER_PORT,
    ray_token_file: group_options.RayTokenFile = None,
    health_port: group_options.HealthPort = 0,
    topology: group_options.Topology = "",
    tensor_parallel_size: options.TensorParallelSize = None,
    pipeline_parallel_size: options.PipelineParallelSize = None,
    data_parallel_size: options.DataParallelSize = None,
    expert_parallel_size: options.ExpertParallelSize = None,
    enable_eplb: options.EnableEplb = None,
    num_redundant_experts: options.NumRedundantExperts = None,
    tp_across_hosts: options.TpAcrossHosts = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    max_model_len: options.MaxModelLen = None,
    max_num_seqs: options.MaxNumSeqs = None,
    max_num_batched_tokens: options.MaxNumBatchedTokens = None,
    gpu_memory_utilization: options.GpuMemoryUtilization = None,
    kv_cache_memory: options.KvCacheMemory = None,
    load_format: options.LoadFormat = None,
    revision: options.Revision = None,
    quantization: options.Quantization = None,
    served_model_name: options.ServedModelName = None,
    lora_modules: options.LoraModules = None,
    max_loras: options.MaxLoras = None,
    max_lora_rank: options.MaxLoraRank = None,
    enable_prefix_caching: options.EnablePrefixCaching = None,
    async_scheduling: options.AsyncScheduling = None,
    guided_decoding_backend: options.GuidedDecodingBackend = None,
    attention_backend: options.AttentionBackend = None,
    spare_ranks: options.SpareRanks = None,
    deterministic: options.Deterministic = None,
    drain_timeout: options.DrainTimeout = None,
    security_file: options.SecurityFile = None,
    otlp_endpoint: options.OtlpEndpoint = None,
    log_format: options.LogFormat = None,
    config: options.Config = None,
) -> None:
    """Run one replica whose ranks are on this host and on those where remuda worker runs; no clients' API.

    Front ends reach its leader at --leader-port. /livez and /readyz at --health-port follow its progress. SIGTERM has
    running requests finish, or move to other replicas.
    """
    given = locals() | {"address": f"{node_ip}:{ray_port}"}
    flags = {name: given[name] for name in ServeConfig.model_fields if name in given}
    serve_config = _as_here(load_serve_config(flags, config))
    checked = _for_group(preflight(serve_config), hosts, devices, leader_port, host_wait)
    device, secret = checked.launch.replica.device, checked.launch.secret
    here = GroupHost(node_ip, device, devices, secret, ray_token_file, parse_topology(topology))
    with head(here, ray_port):
        raise typer.Exit(_run(serve_config, checked, node_ip, health_port))


def _as_here(config: ServeConfig) -> ServeConfig:
    """The group's hosts are alike, so this one's devices say what all have."""
    return config.model_copy(update={"device": local_device(config.device)})


def _for_group(checked: Preflight, num_hosts: int, num_devices: int, leader_port: int, host_wait_s: float) -> Preflight:
    """What a group's hosts need beside what one host does. Raises LayoutError where they have too few devices."""
    launch = checked.launch
    parallel, num_places = launch.replica.parallel, num_hosts * num_devices
    if parallel.num_ranks > num_places:
        raise LayoutError(
            f"{parallel.product}: more than --hosts {num_hosts} × --devices {num_devices} = {num_places}; raise them "
            "or lower the degrees"
        )
    replica = msgspec.structs.replace(launch.replica, leader_port=leader_port, host_wait_s=host_wait_s)
    launch = msgspec.structs.replace(launch, replica=replica, num_hosts=num_hosts)
    return Preflight(launch, checked.directory, checked.model)


def _run(config: ServeConfig, checked: Preflight, node_ip: str, health_port: int) -> int:
    console = open_console(config.log_format, "remuda-engine")

    def probes(fleet: Fleet) -> EngineFront:
        return EngineFront(node_ip, health_port, fleet)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(Serving(console, config, checked, probes).run())
