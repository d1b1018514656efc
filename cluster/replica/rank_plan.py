"""Who connects to whom in a gang, and what each rank is told. Pure."""

import secrets
from collections.abc import Collection
from typing import Self

import msgspec

from cluster.replica.events import ReplicaPlan
from cluster.replica.placed_rank import PlacedRank
from engine.config import Dtype, LoadFormat
from engine.executor.worker_config import RelayConfig, WorkerConfig


class GangEndpoints(msgspec.Struct, frozen=True):
    """Where the leader's step channel listens, as its ranks reach it. ``remote`` is empty where all ranks are local."""

    leader_host: str
    local: str
    remote: str
    secret: str

    def encode(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        return msgspec.json.decode(data, type=cls)


def listen_addresses(leader_host: str, rank_hosts: list[str]) -> list[str]:
    """What the leader listens at: a Unix socket for ranks of its own host, TCP where there are others."""
    addresses = []
    if leader_host in rank_hosts:
        addresses.append(f"unix:@remuda-{secrets.token_hex(12)}")
    if any(host != leader_host for host in rank_hosts):
        addresses.append(f"tcp:{leader_host}:0")
    return addresses


def worker_configs(
    plan: ReplicaPlan,
    ranks: list[PlacedRank],
    endpoints: GangEndpoints,
    store_host: str,
    store_port: int,
    *,
    epoch: int = 0,
    num_blocks: int = 0,
    loaded: Collection[int] = (),
) -> list[WorkerConfig]:
    """One per rank, in order. On each host but the leader's one rank relays for the others: the first of those that are
    ``loaded`` (they join at once, and have no time to wait for a process that only starts), else the first.
    ``num_blocks``: of a gang that has served before."""
    by_host = {placed.host: [each.rank for each in ranks if each.host == placed.host] for placed in ranks}
    relays = {host: min(local, key=lambda rank: (rank not in loaded, rank)) for host, local in by_host.items()}
    relay_name = secrets.token_hex(12)
    configs = []
    for placed in ranks:
        address, relay = endpoints.local, None
        if placed.host != endpoints.leader_host:
            address = f"unix:@remuda-{relay_name}-{relays[placed.host]}"
            if placed.rank == relays[placed.host]:
                relay = RelayConfig(endpoints.remote, tuple(by_host[placed.host]))
        configs.append(
            WorkerConfig(
                rank=placed.rank,
                epoch=epoch,
                num_blocks=num_blocks,
                channel_address=address,
                secret=endpoints.secret,
                model=plan.model,
                tp=plan.tensor_parallel_size,
                pp=plan.pipeline_parallel_size,
                dp=plan.data_parallel_size,
                ep=plan.expert_parallel_size,
                determinism=plan.determinism,
                num_shards=plan.num_shards,
                num_redundant_experts=plan.num_redundant_experts,
                balances_experts=plan.balances_experts,
                dtype=Dtype(plan.dtype),
                load_format=LoadFormat(plan.load_format),
                quantization=plan.quantization,
                guided_decoding_backend=plan.guided_decoding_backend,
                attention_backend=plan.attention_backend,
                device=plan.device,
                relay=relay,
                host_ranks=tuple(by_host[placed.host]),
                store_host=store_host,
                store_port=store_port,
                bind_address=placed.host,
                max_num_seqs=plan.max_num_seqs,
                max_num_batched_tokens=plan.max_num_batched_tokens,
                kv_cache_memory_bytes=plan.kv_cache_memory_bytes,
                gpu_memory_utilization=plan.gpu_memory_utilization,
                depth=plan.depth,
            )
        )
    return configs
