"""Plain values that the serving side's packages share."""

import enum
from dataclasses import asdict, dataclass, field
from typing import Any

from engine.request import AdapterInfo
from engine.scheduler.expert_stats import ExpertStats


class ReplicaState(enum.StrEnum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"
    REPAIRING = "repairing"
    """The gang forms anew. What runs goes on afterwards; new requests wait until then."""

    @property
    def takes_requests(self) -> bool:
        return self in (ReplicaState.READY, ReplicaState.REPAIRING)


@dataclass(frozen=True)
class RankInfo:
    """One rank as ``remuda status`` shows it.

    ``state``: idle, busy, stalled or dead; in a failed gang stalled or dead is the rank that was lost, and the others
    have ended. ``step``, ``operation``, ``since_s``: where it is (or was last) and for how long.
    ``weight_bytes_from_peers``, ``weight_bytes_from_disk``: whence its weights came when it loaded them.
    """

    rank: int
    pid: int
    host: str
    device: str
    state: str
    step: int = 0
    operation: str = ""
    since_s: float = 0.0
    weight_bytes_from_peers: int = 0
    weight_bytes_from_disk: int = 0


@dataclass(frozen=True)
class ReplicaInfo:
    """What a leader says of itself. ``address`` is host:port of its gRPC server; the gauges are of that moment."""

    id: str
    model: str
    state: ReplicaState
    address: str
    incarnation: int
    max_model_len: int
    max_num_seqs: int
    block_size: int
    num_blocks: int
    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    num_steps: int = 0
    ranks: tuple[RankInfo, ...] = ()
    phase_seconds: dict[str, float] = field(default_factory=dict)
    error: str = ""
    progress_age_s: float = 0.0
    """While there is work: seconds since a step last finished. 0 when idle."""
    progress_limit_s: float = 0.0
    """While there is work: beyond that it is a stall. 0: not known."""
    adapters: tuple[AdapterInfo, ...] = ()
    experts: ExpertStats | None = None
    max_loras: int = 0
    """Adapters that may be loaded at once."""


@dataclass(frozen=True)
class ServerStatus:
    """What a front end says of itself and its replicas. ``num_generated_tokens``: by this front end, ever."""

    model: str
    version: str
    draining: bool
    num_live_requests: int
    num_generated_tokens: int
    replicas: tuple[ReplicaInfo, ...]

    def as_object(self) -> dict[str, Any]:
        """The JSON form, of ``remuda status --json`` and /v1/status; its fields are part of the product's contract."""
        return {
            "model": self.model,
            "version": self.version,
            "draining": self.draining,
            "num_live_requests": self.num_live_requests,
            "num_generated_tokens": self.num_generated_tokens,
            "replicas": [_replica_object(info) for info in self.replicas],
        }


def _replica_object(info: ReplicaInfo) -> dict[str, Any]:
    return {
        "id": info.id,
        "state": info.state.value,
        "address": info.address,
        "max_model_len": info.max_model_len,
        "num_running": info.num_running,
        "num_waiting": info.num_waiting,
        "kv_cache_usage": info.kv_cache_usage,
        "num_steps": info.num_steps,
        "progress_age_s": info.progress_age_s,
        "progress_limit_s": info.progress_limit_s,
        "experts": None if info.experts is None else dict(vars(info.experts)),
        "phase_seconds": info.phase_seconds,
        "error": info.error,
        "ranks": [asdict(rank) for rank in info.ranks],
    }
