"""A model small enough to see through, and plans for a rank that has it: the next token is always the last one plus
one."""

import math
from pathlib import Path

import torch

from engine.attention.backend import KvCacheView, StepAttention
from engine.attention.registry import attention_backend
from engine.batch import ForwardBatch
from engine.config import Dtype
from engine.executor.grammar_masks import GrammarMasks
from engine.executor.kv_cache import allocate_kv_cache
from engine.executor.late_samples import LateSamples
from engine.executor.model_runner import ModelRunner
from engine.layer_config import LayerConfig
from engine.messages import BatchPlan, NewRequest, ScheduledRequest, StepPlan, StepResult
from engine.model_config import ModelConfig, kv_groups
from engine.parallel.mesh import Mesh
from engine.parameter import Conversion, TensorSlice
from engine.progress import RankProgress
from engine.request import SamplingParams
from engine.rope_config import RopeConfig
from engine.slot_table import SlotTable

VOCAB = 300
BLOCK_SIZE = 4
NAN_TOKEN, HUGE_TOKEN = 290, 291
CPU = torch.device("cpu")


class CountingModel:
    """Hidden states are the token ids; the logits favour the next id. Two ids break it."""

    slices: tuple[TensorSlice, ...] = ()
    conversions: tuple[Conversion, ...] = ()
    dtype = torch.float32

    def __init__(self, config: ModelConfig, mesh: Mesh) -> None:
        self.config = config
        self.mesh = mesh
        self.batches: list[ForwardBatch] = []
        self.logits_rows: list[int] = []

    def forward(
        self,
        batch: ForwardBatch,
        kv_cache: KvCacheView,
        attention: StepAttention,
        hidden: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self.batches.append(batch)
        if HUGE_TOKEN in batch.token_ids.tolist():
            torch.empty(2**60)
        return batch.token_ids[:, None].float()

    def forward_idle(self) -> None:
        raise AssertionError("no dp group of this model is ever idle beside others")

    def logits(self, hidden_rows: torch.Tensor) -> torch.Tensor | None:
        self.logits_rows.append(len(hidden_rows))
        if self.mesh.tp_rank:
            return None
        ids = hidden_rows[:, 0].long()
        logits = torch.zeros(len(ids), VOCAB)
        logits[torch.arange(len(ids)), (ids + 1) % VOCAB] = 5.0
        logits[ids == NAN_TOKEN] = math.nan
        return logits


def make_runner(
    *, late: bool = False, mesh: Mesh | None = None, progress: RankProgress | None = None
) -> tuple[ModelRunner, CountingModel, KvCacheView]:
    """``late``: tokens are read after the next step was launched, as on a GPU."""
    mesh = mesh or Mesh(progress=progress or RankProgress())
    layers = (LayerConfig(8), LayerConfig(8, chunk_size=8))
    rope = RopeConfig(theta=10000.0, head_dim=4, original_max_positions=1000)
    config = ModelConfig("none", VOCAB, 8, 2, 2, 4, layers, rope, 1e-5, 1000)
    model = CountingModel(config, mesh)
    cache = allocate_kv_cache(config, mesh, num_blocks=50, block_size=BLOCK_SIZE, dtype=Dtype.FLOAT32, device=CPU)
    slots = SlotTable(num_slots=4, kv_groups=kv_groups(config), block_size=BLOCK_SIZE, num_blocks=50, epoch=0)
    grammars = GrammarMasks(Path("none"), VOCAB)
    samples = LateSamples(slots, 4, CPU) if late else None
    attention = attention_backend()
    runner = ModelRunner(model, mesh, cache, slots, grammars, attention=attention, device=CPU, late=samples)
    return runner, model, cache


def params(**options: object) -> SamplingParams:
    return SamplingParams(max_tokens=9, temperature=0.0, **options)  # type: ignore[arg-type]


def admit(slot: int, token_ids: list[int], first_block: int, **options: object) -> tuple[NewRequest, ScheduledRequest]:
    num_blocks = len(token_ids) // BLOCK_SIZE + 1
    blocks = [list(range(first_block + g * num_blocks, first_block + (g + 1) * num_blocks)) for g in range(2)]
    new = NewRequest(slot, token_ids, len(token_ids), params(**options))
    return new, ScheduledRequest(slot, 0, len(token_ids), [], blocks, True)


def plan(
    step: int, *admitted: tuple[NewRequest, ScheduledRequest], scheduled: list[ScheduledRequest] | None = None
) -> StepPlan:
    batch = BatchPlan([], [new for new, _ in admitted], [share for _, share in admitted] + (scheduled or []))
    return StepPlan(0, step, [batch])


def tokens(result: StepResult) -> dict[int, int]:
    return {sampled.slot: sampled.token_id for sampled in result.all_sampled}
