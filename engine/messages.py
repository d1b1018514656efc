"""The step protocol's messages between a gang's leader and its ranks (docs/step_protocol.md).

MessagePack through msgspec, arrays instead of maps: both sides are one build. No tensors travel here. A newer writer
may append fields (with defaults); fields are never reordered.
"""

from collections.abc import Sequence

import msgspec

from engine.errors import ProtocolViolation
from engine.packed import num_packed, pack, unpack
from engine.request import SamplingParams, TopLogprobs

NULL_BLOCK = 0
"""Block id 0 is never handed out: it pads block tables and stands where a chunked layer's block was freed."""
NO_STEP = -1
NO_ADAPTER = -1
"""Adapter slot of a request to the base model."""


class NewRequest(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A request that the ranks do not know yet, in full.

    ``token_ids``: prompt, then tokens generated before (preemption or failover). ``slot``: the number by which plans
    name it from now on, until a plan lists it in ``removed``; 0 ≤ slot < max_num_seqs. ``adapter``: the slot of its
    LoRA adapter. ``block_ids[g]``: its block table of KV group g at the beginning, of blocks that hold its first tokens
    already (NULL_BLOCK where they can no longer be seen); empty where there are none.
    """

    slot: int
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    adapter: int = NO_ADAPTER
    block_ids: list[list[int]] = []


class ScheduledRequest(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One request's share of a step: the tokens at positions start … start + num_tokens − 1 are computed.

    Their ids are what the rank knows of the slot's history, extended by ``token_ids`` (values that the rank did not
    know; they end at the last scheduled position), or, where ``input_step`` is not NO_STEP, by what the rank itself
    sampled for this slot in that step (asynchronous scheduling: the leader does not know it yet).
    ``new_block_ids[g]`` are appended to the slot's block table of KV group g before the step (empty: none anywhere).
    ``sample``: a next token, or the prompt's embedding, is wanted after the last position (false for all but a prompt's
    last chunk).
    """

    slot: int
    start: int
    num_tokens: int
    token_ids: list[int]
    new_block_ids: list[list[int]]
    sample: bool
    input_step: int = NO_STEP


class BatchPlan(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One dp group's part of a step. Empty lists for an idle group. ``removed`` takes effect first, then ``new``."""

    removed: list[int]
    new: list[NewRequest]
    scheduled: list[ScheduledRequest]
    block_copies: list[tuple[int, int]] = []
    """(source, destination) block ids, copied before the step."""
    decodes: bytes = b""
    """Slots (engine.packed) that compute one token more, in a block that they have: the token that was last sampled for
    them, and a next one is wanted. They come before ``scheduled``."""

    @property
    def is_idle(self) -> bool:
        """Nothing is computed."""
        return not (self.scheduled or self.decodes)

    @property
    def num_tokens(self) -> int:
        return num_packed(self.decodes) + sum(share.num_tokens for share in self.scheduled)

    @property
    def sampling_slots(self) -> list[int]:
        """Those that want a token or an embedding, in the order in which a rank gives them."""
        return unpack(self.decodes) + [share.slot for share in self.scheduled if share.sample]


class LoadAdapter(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="load"):
    """Every rank reads the LoRA adapter in the directory ``path`` of its own host into the free adapter slot ``slot``.

    Whether or not that succeeds, the slot is in use until it is unloaded. ``max_rank`` bounds the adapter's rank.
    """

    slot: int
    path: str
    max_rank: int


class UnloadAdapter(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="unload"):
    """The adapter slot is free. No request in a slot has it any more once the plan's ``removed`` are gone."""

    slot: int


AdapterChange = LoadAdapter | UnloadAdapter


class LayerExperts(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Where one layer's experts are: ``slots[ep rank][slot]`` is an expert (engine.parallel.expert_balance)."""

    layer: int
    slots: list[list[int]]


class StageExperts(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="stage"):
    """Every rank that has the layer begins to read, while steps go on, the experts that it lacks for ``placement``; an
    ExpertOutcome follows in the result of some later plan. ``move``: names this move within the epoch."""

    move: int
    placement: LayerExperts


class UseExperts(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="use"):
    """From this plan on the layer's experts are where ``move`` puts them, which all its ranks have read."""

    move: int


class DropExperts(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="drop"):
    """The move will not be: what was read for it is freed."""

    move: int


ExpertChange = StageExperts | UseExperts | DropExperts


class StepPlan(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="plan"):
    """One forward pass of the whole gang. ``batches[d]`` belongs to dp group d. Steps of an epoch count from 0.

    ``adapters`` take effect first, in order and on all ranks; so do ``experts``. ``expert_table``: how many UseExperts
    this epoch has had with this plan, the number of the expert table that it is computed with.
    """

    epoch: int
    step: int
    batches: list[BatchPlan]
    adapters: list[AdapterChange] = []
    experts: list[ExpertChange] = []
    expert_table: int = 0


class InitCache(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="init_cache"):
    """Sent once per epoch when all ranks have loaded: allocate this many blocks, warm up, then answer Ready.

    ``experts``: where the epoch's experts are to begin with, of layers where that is not the linear placement. A rank
    that holds others reads what it lacks.
    """

    epoch: int
    num_blocks: int
    max_model_len: int
    experts: list[LayerExperts] = []


class Shutdown(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="shutdown"):
    """The rank leaves its loop and exits with status 0."""

    reason: str


ToRank = StepPlan | InitCache | Shutdown


class SampledToken(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """``slot``'s next token, with log-probabilities where the request asked."""

    slot: int
    token_id: int
    logprobs: TopLogprobs | None = None


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Of a slot's prompt tokens at positions ``start`` and after: that of token p is predicted from those before p."""

    slot: int
    start: int
    logprobs: list[TopLogprobs]


class PooledState(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """``slot``'s embedding: [hidden_size] float32 of length 1, little-endian."""

    slot: int
    values: bytes


class SlotError(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One request could not be computed (for example NaN logits); the rest of the step is good."""

    slot: int
    message: str


class AdapterOutcome(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What became of a LoadAdapter on a rank: ``num_bytes`` that it holds, or why it failed (``error``)."""

    rank: int
    slot: int
    num_bytes: int = 0
    error: str = ""


class ExpertOutcome(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What became of a StageExperts on a rank: ``num_bytes`` are there, read in ``seconds``, or ``error``: why not."""

    rank: int
    move: int
    num_bytes: int = 0
    seconds: float = 0.0
    error: str = ""


class ExpertLoads(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """(Token, expert) pairs that a rank's slots have had since its last report, ``by_layer[i][slot]`` in the i-th
    mixture layer of its stage, over ``num_steps`` steps that took ``duration_us``. All of them were computed with the
    table of the plan before the one that is answered, or an equal one."""

    rank: int
    by_layer: list[list[int]]
    num_steps: int
    duration_us: int


class StepResult(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="result"):
    """A rank's answer to a plan, one per rank and plan, in order of steps.

    Only the sampling rank of each dp group (tp rank 0 of the last stage) fills the lists of its batch; every rank fills
    ``adapters``, one for each LoadAdapter, ``expert_outcomes`` as they come, and now and then ``expert_loads``. Sampled
    tokens come packed (``slots`` and ``token_ids``) or, where they have log-probabilities, in ``sampled``.
    """

    epoch: int
    step: int
    rank: int
    sampled: list[SampledToken] = []
    prompt_logprobs: list[PromptLogprobs] = []
    errors: list[SlotError] = []
    duration_us: int = 0
    adapters: list[AdapterOutcome] = []
    expert_outcomes: list[ExpertOutcome] = []
    expert_loads: list[ExpertLoads] = []
    slots: bytes = b""
    """engine.packed, of those whose tokens have no log-probabilities, in the plan's order."""
    token_ids: bytes = b""
    """engine.packed, as many as ``slots``."""
    pooled: list[PooledState] = []

    @classmethod
    def of(
        cls,
        epoch: int,
        step: int,
        rank: int,
        sampled: Sequence[SampledToken],
        prompt_logprobs: Sequence[PromptLogprobs] = (),
        errors: Sequence[SlotError] = (),
        pooled: Sequence[PooledState] = (),
    ) -> "StepResult":
        """Packs what can be packed."""
        plain = [each for each in sampled if each.logprobs is None]
        return cls(
            epoch,
            step,
            rank,
            [each for each in sampled if each.logprobs is not None],
            list(prompt_logprobs),
            list(errors),
            slots=pack([each.slot for each in plain]),
            token_ids=pack([each.token_id for each in plain]),
            pooled=list(pooled),
        )

    @property
    def all_sampled(self) -> list[SampledToken]:
        """Raises ProtocolViolation where the packed lists are broken."""
        slots, token_ids = unpack(self.slots), unpack(self.token_ids)
        if len(slots) != len(token_ids):
            raise ProtocolViolation(f"step {self.step}: {len(token_ids)} tokens of {len(slots)} slots")
        return [*map(SampledToken, slots, token_ids), *self.sampled]


class Hello(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="hello"):
    """First message of a rank on its channel. ``runs``: what its process is made of, by name (WorkerConfig)."""

    epoch: int
    rank: int
    pid: int
    host: str
    device: str
    runs: dict[str, str] = {}


class LoadProgress(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="progress"):
    """``phase``: import, rendezvous, load, profile, warm_up. Bytes count the rank's own shard, in ``load`` only."""

    rank: int
    phase: str
    num_bytes_done: int = 0
    num_bytes_total: int = 0


class Loaded(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="loaded"):
    """Weights are in memory and a step of the largest size was profiled.

    ``kv_bytes_available``: bytes that this rank can give to KV blocks. ``block_bytes``: bytes of one block on this
    rank. ``phase_seconds``: seconds by phase. ``num_bytes_from_peers``, ``num_bytes_from_disk``: of its weights, from
    where they came when it loaded them; ``is_newcomer``: in this formation.
    """

    rank: int
    weight_bytes: int
    kv_bytes_available: int
    block_bytes: int
    phase_seconds: dict[str, float]
    num_bytes_from_peers: int = 0
    num_bytes_from_disk: int = 0
    is_newcomer: bool = False


class Ready(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="ready"):
    """The cache is allocated and warm-up is over."""

    rank: int
    phase_seconds: dict[str, float]


class RankError(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="error"):
    """The rank cannot go on and exits. ``kind``: the class name in the error tree. ``detail``: a traceback for logs.
    ``culprit``: the rank that it blames; None: itself, or it does not know."""

    epoch: int
    step: int
    rank: int
    kind: str
    message: str
    detail: str
    culprit: int | None = None


FromRank = Hello | LoadProgress | Loaded | Ready | StepResult | RankError

_encoder = msgspec.msgpack.Encoder()
_to_rank: msgspec.msgpack.Decoder[ToRank] = msgspec.msgpack.Decoder(ToRank)
_from_rank: msgspec.msgpack.Decoder[FromRank] = msgspec.msgpack.Decoder(FromRank)


def encode(message: ToRank | FromRank) -> bytes:
    return _encoder.encode(message)


def decode_to_rank(data: bytes | memoryview) -> ToRank:
    """Raises msgspec.DecodeError where the bytes are not a message to a rank."""
    return _to_rank.decode(data)


def decode_from_rank(data: bytes | memoryview) -> FromRank:
    """Raises msgspec.DecodeError where the bytes are not a message from a rank."""
    return _from_rank.decode(data)
