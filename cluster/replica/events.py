"""What the control process (it starts Ray and the gangs) tells the process that started it: JSON lines over a pipe."""

import msgspec

from cluster.identity.cluster_tls import ClusterTls
from engine.config import Determinism, ParallelConfig


class ReplicaPlan(msgspec.Struct, frozen=True):
    """Everything that a replica's processes must know; the same for all replicas of a model."""

    model: str
    revision: str | None
    served_name: str
    tensor_parallel_size: int
    pipeline_parallel_size: int
    data_parallel_size: int
    expert_parallel_size: int
    dtype: str
    device: str
    load_format: str
    max_model_len: int | None
    max_num_seqs: int
    max_num_batched_tokens: int
    gpu_memory_utilization: float
    kv_cache_memory_bytes: int
    determinism: Determinism = Determinism.OFF
    num_shards: int = 1
    """See engine.config.ParallelConfig."""
    num_redundant_experts: int = 0
    balances_experts: bool = False
    quantization: str | None = None
    """int8, int4 or fp8: a float checkpoint is quantized while it is loaded."""
    lora_modules: dict[str, str] = {}
    """LoRA adapters that are there from the beginning: name to directory."""
    max_loras: int = 8
    max_lora_rank: int = 64
    enable_prefix_caching: bool = True
    depth: int = 1
    guided_decoding_backend: str = "llguidance"
    attention_backend: str = "auto"
    spare_ranks: int = 0
    """Processes per host that have imported what a rank needs, and stand by to take a lost one's place."""
    host_wait_s: float = 0.0
    """So long a lost rank may wait for a host with room for it: one that joins, or its own when it is back."""
    leader_port: int = 0
    """Of the leader's gRPC server, on its host; 0 takes a free one."""
    cluster_tls: ClusterTls | None = None
    """Between front ends and the leader; None: plain text."""
    otlp_endpoint: str | None = None
    """Where the leader sends spans; None: nowhere."""
    log_format: str = "text"
    """``json``: as cluster.telemetry.logs has it."""

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(
            tp=self.tensor_parallel_size,
            pp=self.pipeline_parallel_size,
            dp=self.data_parallel_size,
            ep=self.expert_parallel_size,
            determinism=self.determinism,
            num_shards=self.num_shards,
            num_redundant_experts=self.num_redundant_experts,
            balances_experts=self.balances_experts,
        )

    @property
    def num_slots(self) -> int:
        """Requests that run at once, over all dp groups."""
        return self.max_num_seqs * self.data_parallel_size


class LaunchConfig(msgspec.Struct, frozen=True):
    """The control process's whole configuration. ``address`` None: start a private Ray on this host."""

    replica: ReplicaPlan
    num_replicas: int
    address: str | None
    cpu_slots: int
    secret: str
    """Shared by the front end and the leaders; the leaders refuse a stream without it."""
    tp_across_hosts: bool = False
    max_replicas: int = 1
    """More than ``num_replicas``: their number follows the load."""
    drain_timeout_s: float = 30.0
    num_hosts: int = 1
    """So many hosts the Ray cluster must have before anything is placed."""
    links: tuple[tuple[str, str, float], ...] | None = None
    """From a node to another, seconds: measured when the first gangs were placed, if it was."""
    on_gpus: ReplicaPlan | None = None
    """Instead of ``replica``, if the cluster at ``address`` has GPUs: the user left it open. None: it is decided."""

    @property
    def is_managed(self) -> bool:
        """Whether Ray Serve manages the replicas: it replaces those that fail."""
        return max(self.num_replicas, self.max_replicas) > 1


class PhaseStarted(msgspec.Struct, frozen=True, tag="phase"):
    """Start-up entered ``phase`` (of ``replica``, where it is one replica's)."""

    phase: str
    replica: str = ""


class Loading(msgspec.Struct, frozen=True, tag="loading"):
    """Bytes of weights read so far, summed over the replica's ranks."""

    replica: str
    num_bytes_done: int
    num_bytes_total: int


class RankPlaced(msgspec.Struct, frozen=True, tag="rank"):
    """A rank has joined the formation of this epoch."""

    replica: str
    rank: int
    pid: int
    host: str
    device: str
    epoch: int = 0


class MemoryPlanned(msgspec.Struct, frozen=True, tag="planned"):
    """What is expected of every replica, before anything is loaded: bytes of each rank's weights, in order of rank, and
    KV blocks (on GPUs at most so many; None where the devices' memory is not known here)."""

    weight_bytes: list[int]
    num_blocks: int | None


class Notice(msgspec.Struct, frozen=True, tag="notice"):
    """Something that the user may want to change; the start goes on."""

    text: str


class RankLoaded(msgspec.Struct, frozen=True, tag="loaded"):
    """A rank holds its weights."""

    replica: str
    rank: int
    weight_bytes: int
    epoch: int = 0


class ReplicaReady(msgspec.Struct, frozen=True, tag="ready"):
    """The leader serves at ``address`` (host:port); what else there is to know, it tells itself (GetInfo). It comes
    again, with another address, when a leader has been replaced."""

    replica: str
    address: str
    num_blocks: int


class GangBroke(msgspec.Struct, frozen=True, tag="broke"):
    """The formation of this epoch is over. ``culprit``: the rank that did it, where that is known."""

    replica: str
    epoch: int
    culprit: int | None
    message: str


class BreaksExplained(msgspec.Struct, frozen=True, tag="explained"):
    """So many of the gang's last breaks were the doing of requests that have been ended, and it has gone on since
    (engine.scheduler.break_trials)."""

    replica: str
    num_breaks: int


class DrainBegun(msgspec.Struct, frozen=True, tag="draining"):
    """The leader was asked to take no new requests. One that takes its place is to go on with that."""

    replica: str


class AdaptersChanged(msgspec.Struct, frozen=True, tag="adapters"):
    """The adapters that the leader has now, name to directory. One that takes its place is to have the same."""

    replica: str
    adapters: dict[str, str]


class GangFormed(msgspec.Struct, frozen=True, tag="formed"):
    """All ranks of this epoch are ready. ``phase_seconds``: of the slowest rank in each phase of this formation.
    ``weight_bytes``: of its newcomers' weights, those from ``peers`` and those from ``disk``."""

    replica: str
    epoch: int
    num_blocks: int
    phase_seconds: dict[str, float]
    weight_bytes: dict[str, int] = {}


class Repairing(msgspec.Struct, frozen=True, tag="repairing"):
    """Something of the replica was lost, and the gang forms anew as ``epoch``; its streams go on after that."""

    replica: str
    epoch: int
    ranks: list[int]
    """Those that are replaced."""
    leader: bool
    """Whether the leader is."""
    message: str


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """Start-up failed, or a replica broke later. ``kind`` is the class in the error tree."""

    kind: str
    message: str
    replica: str = ""


class ReplicaEnded(msgspec.Struct, frozen=True, tag="ended"):
    """A managed replica is gone, with everything that belonged to it; if another takes its place, it has another id."""

    replica: str


class Stopped(msgspec.Struct, frozen=True, tag="stopped"):
    """All that was started has been stopped."""


Event = (
    PhaseStarted
    | Loading
    | RankPlaced
    | MemoryPlanned
    | Notice
    | RankLoaded
    | ReplicaReady
    | GangBroke
    | BreaksExplained
    | DrainBegun
    | AdaptersChanged
    | GangFormed
    | Repairing
    | Failed
    | ReplicaEnded
    | Stopped
)

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)
_config_decoder = msgspec.json.Decoder(LaunchConfig)


def encode_event(event: Event) -> bytes:
    return _encoder.encode(event) + b"\n"


def decode_event(line: bytes) -> Event:
    return _decoder.decode(line)


def encode_config(config: LaunchConfig) -> bytes:
    return _encoder.encode(config) + b"\n"


def decode_config(line: bytes) -> LaunchConfig:
    return _config_decoder.decode(line)
