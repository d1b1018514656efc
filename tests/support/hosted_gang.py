"""A gang as it is served, of processes that ``run_ranks`` has put on hosts: a leader's engine, the step channel with
its relays, ranks. Each process is told its part through the store that all of them have."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec

from cluster.replica.events import ReplicaPlan
from cluster.replica.placed_rank import PlacedRank
from cluster.replica.rank_plan import GangEndpoints, listen_addresses, worker_configs
from engine.executor.channel_executor import ChannelExecutor
from engine.executor.formations import Formations
from engine.executor.handshake import new_secret
from engine.executor.socket_hub import SocketHub
from engine.executor.worker import run_worker
from engine.executor.worker_config import WorkerConfig
from engine.model_config import ModelConfig
from engine.parallel.store import serve_store
from tests.support.gang_engine import GangEngine
from tests.support.rank_pool import RankContext

_TIMEOUT_S = 60.0


def serve_as_rank(context: RankContext) -> None:
    """Returns when the leader has ended the gang."""
    formations = Formations(_TIMEOUT_S)
    formations.put(WorkerConfig.decode(context.store.get(f"config/{context.rank}")))
    formations.close()
    run_worker(formations)


@contextmanager
def leading(
    context: RankContext, plan: ReplicaPlan, own_address: str, rank_hosts: Sequence[str], block_size: int
) -> Iterator[GangEngine]:
    """``rank_hosts``: the address of each rank's host. Raises what the start of a gang raises."""
    store = serve_store(own_address, _TIMEOUT_S)
    addresses = listen_addresses(own_address, list(rank_hosts))
    hub = SocketHub(range(plan.parallel.num_ranks), secret := new_secret(), addresses)
    channel = ChannelExecutor(hub, plan.parallel)
    try:
        at = {address.partition(":")[0]: address for address in hub.addresses}
        endpoints = GangEndpoints(own_address, at.get("unix", ""), at.get("tcp", ""), secret)
        placed = [PlacedRank(rank, host) for rank, host in enumerate(rank_hosts)]
        configs = worker_configs(plan, placed, endpoints, own_address, store.port)
        configs = [msgspec.structs.replace(config, block_size=block_size) for config in configs]
        for config in configs:
            context.store.set(f"config/{config.rank}", config.encode().decode())
        ready = channel.start(ModelConfig.from_directory(plan.model), block_size=block_size)
        yield GangEngine(channel, ready, configs[0])
    finally:
        channel.close()


def small_plan(model: str, **changes: object) -> ReplicaPlan:
    """Of a gang on CPU cores."""
    values: dict[str, object] = {
        "model": model,
        "revision": None,
        "served_name": "",
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "data_parallel_size": 1,
        "expert_parallel_size": 1,
        "dtype": "float32",
        "device": "cpu",
        "load_format": "safetensors",
        "max_model_len": None,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "gpu_memory_utilization": 0.9,
        "kv_cache_memory_bytes": 2**20,
    }
    return msgspec.convert(values | changes, ReplicaPlan)
