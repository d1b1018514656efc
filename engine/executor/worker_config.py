"""Everything that a rank is told. Knows no torch, so that leaders and supervisors can write it."""

from typing import Self

import msgspec

from engine.config import Determinism, Dtype, LoadFormat, ParallelConfig


class RelayConfig(msgspec.Struct, frozen=True):
    """This rank also fans out for its host: ``leader_address`` is the leader's, ``ranks`` are the host's."""

    leader_address: str
    ranks: tuple[int, ...]


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a rank is told. ``channel_address``, ``secret``: see engine.executor.sockets and handshake.

    ``model``: the checkpoint's directory on the rank's host. ``store_host``, ``store_port``: of the torch TCPStore of
    this epoch (unused by a gang of one). ``bind_address``: this host's, where collectives listen.
    ``kv_cache_memory_bytes`` counts on CPU, ``gpu_memory_utilization`` on CUDA; where ``num_blocks`` is not 0, it does:
    the gang has served before with so many, and its largest step has been computed.
    """

    rank: int
    channel_address: str
    secret: str
    model: str
    epoch: int = 0
    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    determinism: Determinism = Determinism.OFF
    num_shards: int = 1
    """See ParallelConfig."""
    num_redundant_experts: int = 0
    balances_experts: bool = False
    dtype: Dtype = Dtype.FLOAT32
    load_format: LoadFormat = LoadFormat.SAFETENSORS
    quantization: str | None = None
    """int8, int4 or fp8: a float checkpoint is quantized while it is loaded."""
    guided_decoding_backend: str = "llguidance"
    attention_backend: str = "auto"
    """One of engine.attention.registry.CHOICES; of GPUs."""
    device: str = "cpu"
    """cpu, cuda (the first that the process sees) or cuda:N."""
    relay: RelayConfig | None = None
    host_ranks: tuple[int, ...] = ()
    """The ranks on this one's host, itself among them, which share the check of the checkpoint's hashes."""
    runs: dict[str, str] = {}
    """Versions and digests of what the rank's process runs, by name: it tells its leader, who compares."""
    store_host: str = "127.0.0.1"
    store_port: int = 0
    bind_address: str = "127.0.0.1"
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    block_size: int = 16
    kv_cache_memory_bytes: int = 512 * 2**20
    gpu_memory_utilization: float = 0.9
    num_blocks: int = 0
    depth: int = 1
    connect_timeout_s: float = 60.0
    load_timeout_s: float = 3600.0
    """How long a rank that has loaded waits for the slowest of the others."""
    collective_timeout_s: float = 60.0
    """Bounds the rendezvous and each collective."""

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(
            tp=self.tp,
            pp=self.pp,
            dp=self.dp,
            ep=self.ep,
            determinism=self.determinism,
            num_shards=self.num_shards,
            num_redundant_experts=self.num_redundant_experts,
            balances_experts=self.balances_experts,
        )

    def encode(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Raises msgspec.ValidationError."""
        return msgspec.json.decode(data, type=cls)
