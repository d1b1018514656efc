"""Whole steps of a checkpoint on a gang of CPU ranks, as the leader sees them: from the plan's departure to the result.

Decoding steps are compared with reading memory (all weights, and the keys and values that are attended to), prefill
with a bfloat16 GEMM. Of a mixture's experts a step reads those that its tokens are routed to: they are counted
beforehand, on one rank in this process.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from bench.measure import Row, row
from bench.roof_kernels import Roofs
from engine.config import Determinism, Dtype, ParallelConfig
from engine.deterministic import deterministic_layout
from engine.executor.in_process import InProcessExecutor
from engine.executor.process_gang import ProcessGang
from engine.executor.worker_config import WorkerConfig
from engine.layer_config import LayerConfig
from engine.layers.router import Router
from engine.messages import BatchPlan, NewRequest, ScheduledRequest, StepPlan
from engine.model_config import ModelConfig, kv_groups
from engine.request import SamplingParams
from engine.weights.ledger import ShardBytes, shard_bytes

BATCHES = (1, 8, 32)
PROMPT_TOKENS = 128
PREFILL_TOKENS = 1024
_NUM_STEPS = 8
_BLOCK_SIZE = 16
_SAMPLING = SamplingParams(max_tokens=PREFILL_TOKENS, temperature=0.0)
# Ordinary tokens in every tokenizer.
_FIRST_TOKEN_ID, _NUM_TOKEN_IDS = 300, 500
_SLOT_STRIDE = 37


class GangSteps:
    """Makes plans by hand and times their steps. Each slot has blocks of its own."""

    def __init__(
        self,
        model: Path,
        tp: int,
        quantization: str | None,
        executor: type[ProcessGang] | type[InProcessExecutor] = ProcessGang,
        determinism: Determinism = Determinism.OFF,
    ) -> None:
        self.config = ModelConfig.from_directory(str(model), quantization)
        layout = deterministic_layout(self.config, ParallelConfig(tp=tp), determinism)
        self._num_groups = len(kv_groups(self.config))
        self._blocks_per_slot = self._num_groups * (PREFILL_TOKENS // _BLOCK_SIZE + 2)
        self.gang = executor(
            WorkerConfig(
                rank=0,
                channel_address="",
                secret="",
                model=str(model),
                tp=tp,
                determinism=layout.determinism,
                num_shards=layout.num_shards,
                dtype=Dtype.BFLOAT16,
                quantization=quantization,
                max_num_seqs=max(BATCHES),
                max_num_batched_tokens=max(PREFILL_TOKENS, max(BATCHES) * PROMPT_TOKENS),
                block_size=_BLOCK_SIZE,
                kv_cache_memory_bytes=2**30,
            ),
            max_model_len=min(2 * PREFILL_TOKENS, self.config.max_context_len),
        )
        self._step = 0
        self._lengths: dict[int, int] = {}

    def admit(self, slots: range, num_tokens: int) -> float:
        """Seconds of the step that computes new prompts, all different, in ``slots``; those that were there before are
        gone."""
        removed, self._lengths = list(self._lengths), dict.fromkeys(slots, num_tokens)
        new = [NewRequest(slot, _prompt(slot, num_tokens), num_tokens, _SAMPLING) for slot in slots]
        shares = [ScheduledRequest(slot, 0, num_tokens, [], self._tables(slot), True) for slot in slots]
        return self._seconds(BatchPlan(removed, new, shares))

    def decode(self) -> float:
        """Seconds of a step with one token for every slot."""
        shares = []
        for slot, length in self._lengths.items():
            shares.append(ScheduledRequest(slot, length, 1, [], [], True, input_step=self._step - 1))
            self._lengths[slot] = length + 1
        return self._seconds(BatchPlan([], [], shares))

    def _tables(self, slot: int) -> list[list[int]]:
        first, count = 1 + slot * self._blocks_per_slot, self._blocks_per_slot // self._num_groups
        return [list(range(first + g * count, first + (g + 1) * count)) for g in range(self._num_groups)]

    def _seconds(self, batch: BatchPlan) -> float:
        plan = StepPlan(0, self._step, [batch])
        self._step += 1
        began_s = time.perf_counter()
        (result,) = self.gang.submit(plan).result()
        seconds = time.perf_counter() - began_s
        if result.errors:
            raise RuntimeError(f"step {plan.step} failed: {result.errors[0].message}")
        return seconds


def _prompt(slot: int, num_tokens: int) -> list[int]:
    return [_FIRST_TOKEN_ID + (_SLOT_STRIDE * slot + index) % _NUM_TOKEN_IDS for index in range(num_tokens)]


def run(num_repetitions: int, quick: bool, model: Path, tp: int, quantization: str | None) -> list[Row]:
    config = ModelConfig.from_directory(str(model), quantization)
    is_mixture = any(layer.moe for layer in config.layers)
    shares = _used_shares(model, quantization) if is_mixture else dict.fromkeys(BATCHES, 1.0)
    roofs = Roofs(tp, (64 if quick else 640) * 2**20)
    steps = GangSteps(model, tp, quantization)
    try:
        rows = [_decode(steps, roofs, batch, num_repetitions, tp, shares[batch]) for batch in BATCHES]
        return [*rows, _prefill(steps, roofs, num_repetitions)]
    finally:
        steps.gang.close()


@torch.inference_mode()
def _used_shares(model: Path, quantization: str | None) -> dict[int, float]:
    """By the number of requests: which share of its experts a layer's router chooses in a decoding step, on average."""
    found: dict[int, float] = {}
    shares: list[float] = []
    with _noted_choices(shares):
        steps = GangSteps(model, 1, quantization, InProcessExecutor)
        try:
            for batch in BATCHES:
                steps.admit(range(batch), PROMPT_TOKENS)
                shares.clear()
                for _ in range(_NUM_STEPS):
                    steps.decode()
                found[batch] = sum(shares) / len(shares)
        finally:
            steps.gang.close()
    return found


@contextmanager
def _noted_choices(shares: list[float]) -> Iterator[None]:
    """While it lasts, routers of this process add the share of their experts that they chose."""
    route = Router.forward

    def noting(router: Router, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        expert_ids, scores = route(router, hidden)
        shares.append(len(expert_ids.unique()) / len(router.weight))
        return expert_ids, scores

    Router.forward = noting  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Router.forward = route  # type: ignore[method-assign]


def _decode(steps: GangSteps, roofs: Roofs, batch: int, num_repetitions: int, tp: int, used_share: float) -> Row:
    kv_bytes = _kv_bytes(steps.config, batch, PROMPT_TOKENS + _NUM_STEPS)
    gigabytes = (_read_bytes(steps.config, tp, used_share) + kv_bytes) / 1e9
    ours, theirs = [], []
    for _ in range(num_repetitions):
        theirs.append(roofs.read_gb_s())
        steps.admit(range(batch), PROMPT_TOKENS)
        steps.decode()
        seconds = sorted(steps.decode() for _ in range(_NUM_STEPS))
        ours.append(gigabytes / seconds[_NUM_STEPS // 2])
    note = "÷ best of 5 reads of memory in huge pages beside it"
    return row(f"decode, tp={tp}", f"{batch} × 1 token, {gigabytes:.3f} GB", "GB/s", ours, theirs, "higher", note)


def _prefill(steps: GangSteps, roofs: Roofs, num_repetitions: int) -> Row:
    teraflops = _prefill_flops(steps.config, PREFILL_TOKENS) / 1e12
    steps.admit(range(1), PREFILL_TOKENS)
    ours, theirs = [], []
    for _ in range(num_repetitions):
        theirs.append(roofs.gemm_tflop_s())
        ours.append(teraflops / steps.admit(range(1), PREFILL_TOKENS))
    note = "÷ torch's bfloat16 product of 1024 tokens beside it"
    return row("prefill", f"{PREFILL_TOKENS} tokens", "TFLOP/s", ours, theirs, "higher", note)


def _read_bytes(config: ModelConfig, tp: int, used_share: float = 1.0) -> int:
    """Of weights, on all ranks. Of an embedding that is not the head too, a step reads a few rows only, and of experts
    ``used_share``."""
    shards: list[ShardBytes] = [shard_bytes(config, ParallelConfig(tp=tp), r, Dtype.BFLOAT16) for r in range(tp)]
    unread = sum(shard.by_kind["embedding"] for shard in shards if shard.by_kind.get("head"))
    experts = sum(shard.by_kind.get("experts", 0) for shard in shards)
    return sum(shard.total for shard in shards) - unread - round((1 - used_share) * experts)


def _kv_bytes(config: ModelConfig, batch: int, context: int) -> int:
    return 2 * batch * context * len(config.layers) * config.num_kv_heads * config.head_dim * 2


def _prefill_flops(config: ModelConfig, num_tokens: int) -> int:
    """Products with every matrix that a token meets but the head, which computes one token, and causal attention."""
    attention = config.hidden_size * config.head_dim * 2 * (config.num_heads + config.num_kv_heads)
    matrices = sum(attention + 3 * config.hidden_size * _active_width(layer) for layer in config.layers)
    scores = len(config.layers) * 2 * config.num_heads * config.head_dim * num_tokens * (num_tokens + 1) // 2
    return 2 * (matrices * num_tokens + scores)


def _active_width(layer: LayerConfig) -> int:
    """Of the feed-forward layer, or of all experts that one token meets. A mixture's router is left out."""
    if layer.moe is None:
        return layer.intermediate_size
    return layer.moe.intermediate_size * (layer.moe.num_experts_per_token + layer.moe.has_shared_expert)
