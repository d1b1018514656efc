"""Small frozen configurations; each component gets only its own. Nothing is written into them after construction."""

import enum
from dataclasses import dataclass

from engine.errors import InvalidOption, LayoutError


class Dtype(enum.StrEnum):
    """Formats that a model's activations, and its unquantized weights, are held in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"

    @property
    def num_bytes(self) -> int:
        return {Dtype.FLOAT32: 4, Dtype.BFLOAT16: 2}[self]


class LoadFormat(enum.StrEnum):
    """Where weights come from."""

    SAFETENSORS = "safetensors"
    DUMMY = "dummy"
    """Random values of the right shapes; for sizing. Reads no weights."""


class GrammarBackend(enum.StrEnum):
    """The library that follows grammars."""

    LLGUIDANCE = "llguidance"
    XGRAMMAR = "xgrammar"


class Determinism(enum.StrEnum):
    """What a request's tokens and logits, bit for bit, do not depend on (docs/determinism.md)."""

    OFF = "off"
    D1 = "d1"
    """Its batch, how its prompt was cut, whether a token was prefilled or decoded: within one layout."""
    D2 = "d2"
    """Nor on the layout."""


@dataclass(frozen=True)
class ParallelConfig:
    """Degrees of parallelism. A gang has pp × dp × tp ranks; ep divides dp × tp (docs/architecture.md).

    ``ep`` ranks share out each layer's experts; what remains of dp × tp splits the experts' matrices.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    determinism: Determinism = Determinism.OFF
    num_shards: int = 1
    """Under D2: in how many parts, a power of two, sums over divided dimensions are made (engine.deterministic)."""
    num_redundant_experts: int = 0
    """Room for so many copies of experts in each mixture layer, over all its ep ranks."""
    balances_experts: bool = False
    """Whether experts are moved, and copied into that room, as their loads ask for it."""

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "dp", "ep"):
            if getattr(self, name) < 1:
                raise LayoutError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.num_redundant_experts % self.ep:
            raise LayoutError(
                f"num-redundant-experts={self.num_redundant_experts} must be a multiple of ep={self.ep}: every rank "
                "holds as many experts as any other"
            )
        if self.ep == 1 and (self.num_redundant_experts or self.balances_experts):
            raise LayoutError("experts are balanced over expert-parallel ranks; ep=1 has one (give --ep as well)")
        if (self.dp * self.tp) % self.ep:
            raise LayoutError(
                f"ep must divide dp × tp: ep={self.ep} does not divide {self.dp} × {self.tp} = {self.dp * self.tp} "
                f"({self.product})"
            )

    @property
    def num_ranks(self) -> int:
        return self.pp * self.dp * self.tp

    @property
    def product(self) -> str:
        """For people: how many ranks, and why."""
        return f"pp {self.pp} × dp {self.dp} × tp {self.tp} = {self.num_ranks} ranks"

    @property
    def exchanges_tokens(self) -> bool:
        """Whether experts work for the tokens of several dp groups, which go to them and back by all-to-all; else all
        of a stage's ranks hold the same tokens."""
        return self.dp > 1

    def num_expert_slots(self, num_experts: int) -> int:
        """How many of a layer's ``num_experts`` experts, copies included, each ep rank holds."""
        return (num_experts + self.num_redundant_experts) // self.ep

    @property
    def is_deterministic(self) -> bool:
        return self.determinism is not Determinism.OFF

    @property
    def expert_tp(self) -> int:
        """Over how many ranks one expert's matrices are split."""
        return self.dp * self.tp // self.ep


@dataclass(frozen=True)
class CacheConfig:
    """The KV cache. ``num_blocks`` is known only after memory was profiled."""

    block_size: int = 16
    """Tokens per block."""
    num_blocks: int = 0
    keeps_prefixes: bool = True
    """Whether requests share blocks that hold equal beginnings (prefix caching)."""

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise InvalidOption(f"block size must be at least 1 token, not {self.block_size}")


@dataclass(frozen=True)
class SchedulerConfig:
    """Bounds of one step and of the queue before it."""

    max_num_seqs: int = 64
    """Most requests that run at once."""
    max_num_batched_tokens: int = 2048
    """Most tokens in one step, over all its requests."""
    max_model_len: int = 2048
    """Most tokens of one request, prompt and output together."""
    max_num_waiting: int = 1024
    """Most requests that wait; beyond it ``add`` raises Overloaded."""
    depth: int = 1
    """Plans in flight at most."""
    max_step_stretch: float = 5.0
    """While requests decode, prompts may make a step so many times as long as it would be without them."""

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "max_num_waiting", "depth"):
            if getattr(self, name) < 1:
                raise InvalidOption(f"{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise InvalidOption(
                f"max-num-batched-tokens ({self.max_num_batched_tokens}) must be at least max-num-seqs "
                f"({self.max_num_seqs}), for every running request needs one token a step"
            )


@dataclass(frozen=True)
class LoraConfig:
    """Bounds of what adapters may take: how many at once, and the rank of each one's matrices."""

    max_loras: int = 8
    max_rank: int = 64


@dataclass(frozen=True)
class KvGroupConfig:
    """Layers that share one block table. One pool of blocks of one size serves all groups of a model: on each rank a
    block has room for ``block_size`` tokens' keys and values in as many layers as the rank's largest group has there.

    ``chunk_size``: a token sees only those of its own chunk of that many positions (Llama 4's chunked attention).
    ``window_size``: a token sees itself and those up to that many positions in all (sliding window). At most one is
    set; without, attention is full. Blocks that the next token cannot see any more are freed.
    """

    layers: tuple[int, ...]
    chunk_size: int | None = None
    window_size: int | None = None

    @property
    def is_full(self) -> bool:
        """Whether a token sees all before it, so that no block is freed before the request ends."""
        return self.chunk_size is None and self.window_size is None

    def first_visible(self, position: int) -> int:
        """The first position that the token at ``position`` sees. It never falls as ``position`` grows."""
        if self.chunk_size is not None:
            return position // self.chunk_size * self.chunk_size
        if self.window_size is not None:
            return max(0, position - self.window_size + 1)
        return 0
