"""What a replica says of itself, between our own values and protobuf's messages. As cluster.rpc.convert."""

from cluster.rpc.generated.remuda.v1 import replica_pb2
from cluster.types import RankInfo, ReplicaInfo, ReplicaState
from engine.request import AdapterInfo
from engine.scheduler.expert_stats import ExpertStats

_STATE_TO_PROTO: dict[ReplicaState, replica_pb2.ReplicaState.ValueType] = {
    ReplicaState.STARTING: replica_pb2.REPLICA_STATE_STARTING,
    ReplicaState.READY: replica_pb2.REPLICA_STATE_READY,
    ReplicaState.DRAINING: replica_pb2.REPLICA_STATE_DRAINING,
    ReplicaState.FAILED: replica_pb2.REPLICA_STATE_FAILED,
    ReplicaState.REPAIRING: replica_pb2.REPLICA_STATE_REPAIRING,
}
_STATE_FROM_PROTO = {value: state for state, value in _STATE_TO_PROTO.items()}


def adapter_to_proto(info: AdapterInfo) -> replica_pb2.Adapter:
    return replica_pb2.Adapter(name=info.name, path=info.path, num_bytes=info.num_bytes)


def adapter_from_proto(message: replica_pb2.Adapter) -> AdapterInfo:
    return AdapterInfo(message.name, message.path, message.num_bytes)


def replica_info_to_proto(info: ReplicaInfo) -> replica_pb2.ReplicaInfo:
    return replica_pb2.ReplicaInfo(
        id=info.id,
        model=info.model,
        state=_STATE_TO_PROTO[info.state],
        address=info.address,
        incarnation=info.incarnation,
        max_model_len=info.max_model_len,
        max_num_seqs=info.max_num_seqs,
        block_size=info.block_size,
        num_blocks=info.num_blocks,
        num_running=info.num_running,
        num_waiting=info.num_waiting,
        kv_cache_usage=info.kv_cache_usage,
        num_steps=info.num_steps,
        ranks=map(_rank_to_proto, info.ranks),
        phase_seconds=info.phase_seconds,
        error=info.error,
        progress_age_s=info.progress_age_s,
        progress_limit_s=info.progress_limit_s,
        adapters=map(adapter_to_proto, info.adapters),
        experts=None if info.experts is None else _experts_to_proto(info.experts),
        max_loras=info.max_loras,
    )


def _rank_to_proto(rank: RankInfo) -> replica_pb2.Rank:
    return replica_pb2.Rank(
        rank=rank.rank,
        pid=rank.pid,
        host=rank.host,
        device=rank.device,
        state=rank.state,
        step=rank.step,
        operation=rank.operation,
        since_s=rank.since_s,
        weight_bytes_from_peers=rank.weight_bytes_from_peers,
        weight_bytes_from_disk=rank.weight_bytes_from_disk,
    )


def _rank_from_proto(rank: replica_pb2.Rank) -> RankInfo:
    return RankInfo(
        rank.rank,
        rank.pid,
        rank.host,
        rank.device,
        rank.state,
        rank.step,
        rank.operation,
        rank.since_s,
        rank.weight_bytes_from_peers,
        rank.weight_bytes_from_disk,
    )


def _experts_to_proto(experts: ExpertStats) -> replica_pb2.ExpertBalance:
    return replica_pb2.ExpertBalance(
        imbalance=experts.imbalance,
        rank_pairs=experts.rank_pairs,
        num_moves=experts.num_moves,
        num_failed_moves=experts.num_failed_moves,
        num_moved_experts=experts.num_moved_experts,
        layers=[replica_pb2.ExpertLayer(layer=layer, pairs=pairs) for layer, pairs in experts.layers.items()],
    )


def _experts_from_proto(experts: replica_pb2.ExpertBalance) -> ExpertStats:
    """``layers`` is empty where the leader is older than they are."""
    return ExpertStats(
        experts.imbalance,
        tuple(experts.rank_pairs),
        experts.num_moves,
        experts.num_failed_moves,
        experts.num_moved_experts,
        {layer.layer: tuple(layer.pairs) for layer in experts.layers},
    )


def replica_info_from_proto(message: replica_pb2.ReplicaInfo) -> ReplicaInfo:
    """A state that this version does not know counts as FAILED: no requests go there."""
    return ReplicaInfo(
        id=message.id,
        model=message.model,
        state=_STATE_FROM_PROTO.get(message.state, ReplicaState.FAILED),
        address=message.address,
        incarnation=message.incarnation,
        max_model_len=message.max_model_len,
        max_num_seqs=message.max_num_seqs,
        block_size=message.block_size,
        num_blocks=message.num_blocks,
        num_running=message.num_running,
        num_waiting=message.num_waiting,
        kv_cache_usage=message.kv_cache_usage,
        num_steps=message.num_steps,
        ranks=tuple(map(_rank_from_proto, message.ranks)),
        phase_seconds=dict(message.phase_seconds),
        error=message.error,
        progress_age_s=message.progress_age_s,
        progress_limit_s=message.progress_limit_s,
        adapters=tuple(map(adapter_from_proto, message.adapters)),
        experts=_experts_from_proto(message.experts) if message.HasField("experts") else None,
        max_loras=message.max_loras,
    )
