"""One rank's side of a step: a plan in, a result out."""

import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

from engine.attention.backend import AttentionBackend, KvCacheView
from engine.batch import ForwardBatch
from engine.errors import AdapterError, ProtocolViolation
from engine.executor.batch_builder import build_batch
from engine.executor.expert_loads import LoadCounters
from engine.executor.expert_mover import ExpertMover
from engine.executor.grammar_masks import GrammarMasks
from engine.executor.kv_cache import copy_blocks
from engine.executor.late_samples import LateSamples
from engine.executor.launched_step import LaunchedStep, StepsUnderWay
from engine.executor.logprobs import top_logprobs
from engine.executor.penalties import has_penalties
from engine.executor.pooler import Pooler
from engine.executor.sampler import SamplerOutput, choose, output_of, sample
from engine.executor.sampling_row import GrammarMask, SamplingRow
from engine.executor.seen_tokens import SeenTokens
from engine.executor.stage import run_stage
from engine.kernels.host_copy import to_device
from engine.messages import (
    AdapterOutcome,
    LoadAdapter,
    PromptLogprobs,
    SampledToken,
    SlotError,
    StepPlan,
    StepResult,
    UseExperts,
)
from engine.models.registry import Model
from engine.parallel.mesh import Mesh
from engine.progress import Operation
from engine.request import SamplingParams, TopLogprobs
from engine.slot_table import ScheduledSlot, SlotTable
from engine.weights.adapter_loader import AdapterLoader

_log = logging.getLogger(__name__)

_PROMPT_LOGPROB_ROWS = 128
"""Rows of logits held at once for prompt log-probabilities, so that memory does not grow with the chunk."""


class CapturedSteps(Protocol):
    """Forward passes of some shapes, captured to be replayed; see engine.executor.cuda_graphs."""

    def forward(self, batch: ForwardBatch) -> torch.Tensor | None:
        """Hidden states [T, hidden_size], valid until the next call; None where the batch has no such shape."""
        ...


class ModelRunner:
    """Computes plans in order. Single-threaded.

    Args:
        captured: of this epoch; None where everything is launched kernel by kernel.
        grammars: of the sampling rank; other ranks do not use theirs.
        experts: where experts may move.
        late: where tokens are read after the next step was launched.
    """

    def __init__(
        self,
        model: Model,
        mesh: Mesh,
        cache: KvCacheView,
        slots: SlotTable,
        grammars: GrammarMasks,
        *,
        attention: AttentionBackend,
        device: torch.device,
        captured: CapturedSteps | None = None,
        experts: ExpertMover | None = None,
        late: LateSamples | None = None,
    ) -> None:
        self._model = model
        self._mesh = mesh
        self._cache = cache
        self._slots = slots
        self._grammars = grammars
        self._is_sampling_rank = mesh.tp_rank == 0 and mesh.is_last_stage
        # A plan may refer to a sample that the leader had not seen when it made the plan. Between stages only the
        # leader passes tokens on.
        self._shares_samples = mesh.config.pp == 1
        self._progress = mesh.progress
        self._under_way = StepsUnderWay(mesh.progress)
        self._late = late
        self._device = device
        self._groups = mesh.kv_groups(model.config)
        self._block_size = cache.key_cache[0].shape[1]
        self._attention = attention
        self._captured = captured
        self._experts = experts
        self._loads = LoadCounters(model, mesh)
        self._pooler = Pooler()
        self._seen: dict[int, SeenTokens] = {}
        """By slot, of requests with penalties."""

    @property
    def reads_late(self) -> bool:
        """Whether ``launch`` returns before the device is done."""
        return self._late is not None

    def execute(self, plan: StepPlan) -> StepResult:
        """Raises ProtocolViolation for a plan that may not come now, RankFailure where another rank is lost."""
        return self.launch(plan).finish()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> LaunchedStep:
        """As ``execute``, but whoever calls ``finish`` waits for the device, where the host need not see what was
        sampled before. Always in one thread, in the order of plans; steps launched before need not be finished."""
        began_s = time.perf_counter()
        self._under_way.begin(plan.step)
        while self._under_way.durations_us:
            self._loads.stepped(self._under_way.durations_us.popleft())
        if self._late is not None:
            self._late.take_in(wait=_wants_rest(plan))
        scheduled = self._slots.apply(plan)
        expert_loads = self._loads.report(plan)
        self._change_experts(plan)
        batch = plan.batches[self._mesh.dp_rank]
        self._forget(batch.removed)
        copy_blocks(self._cache, batch.block_copies)
        outcomes = self._change_adapters(plan) if plan.adapters else []
        answer: Callable[[], StepResult] = functools.partial(StepResult, plan.epoch, plan.step, self._mesh.rank)
        if scheduled:
            answer = self._compute(plan, scheduled)
        elif self._mesh.config.exchanges_tokens and not all(other.is_idle for other in plan.batches):
            self._model.forward_idle()
        news = {
            "adapters": outcomes,
            "expert_outcomes": [] if self._experts is None else self._experts.take_outcomes(),
            "expert_loads": expert_loads,
        }
        return LaunchedStep(plan.step, answer, news, self._under_way, began_s)

    def _change_experts(self, plan: StepPlan) -> None:
        if self._experts is not None:
            self._experts.apply(plan)
            if any(isinstance(change, UseExperts) for change in plan.experts):
                self.__dict__.pop("_adapters", None)  # it knows the experts by their slots; none is loaded now
        elif plan.experts or plan.expert_table:
            raise ProtocolViolation("this rank was started without room for experts that move")

    def _forget(self, slots: Sequence[int]) -> None:
        """They hold other requests, or none, from now on."""
        self._grammars.forget(slots)
        self._pooler.forget(slots)
        for slot in slots:
            self._seen.pop(slot, None)

    @functools.cached_property
    def _adapters(self) -> AdapterLoader:
        """Made when the first one comes."""
        return AdapterLoader(self._model, self._mesh)

    def _change_adapters(self, plan: StepPlan) -> list[AdapterOutcome]:
        """An adapter that cannot be loaded is reported, whatever the reason; the rank lives on."""
        outcomes = []
        self._progress.at(Operation.LOAD_ADAPTER)
        for change in plan.adapters:
            if not isinstance(change, LoadAdapter):
                self._adapters.unload(change.slot)
                continue
            try:
                num_bytes = self._adapters.load(change.slot, change.path, change.max_rank)
                outcomes.append(AdapterOutcome(self._mesh.rank, change.slot, num_bytes))
            except AdapterError as error:
                outcomes.append(AdapterOutcome(self._mesh.rank, change.slot, error=str(error)))
            except Exception as error:  # noqa: BLE001  (the leader unloads it again everywhere and tells who asked)
                _log.warning("the adapter in %s could not be loaded", change.path, exc_info=error)
                message = f"{change.path} could not be loaded: {type(error).__name__}: {error}"
                outcomes.append(AdapterOutcome(self._mesh.rank, change.slot, error=message))
        return outcomes

    def _compute(self, plan: StepPlan, scheduled: Sequence[ScheduledSlot]) -> Callable[[], StepResult]:
        """Its answer, which may have to be waited for."""
        if self._late is not None:
            self._late.take_in(wait=any(_looks_back(share.state.sampling) for share in scheduled))
        masks = self._grammars.begin(scheduled) if self._is_sampling_rank else None
        try:
            hidden, logits = self._forward(scheduled)
            prompt_logprobs = self._prompt_logprobs(hidden, scheduled)
            pooled, errors = self._pooler.take(hidden, scheduled) if self._is_sampling_rank else ([], [])
        except RuntimeError as error:
            if self._mesh.config.num_ranks > 1 or not is_out_of_memory(error):
                raise  # other ranks wait in the middle of the same step: only a new epoch helps
            lost = self._out_of_memory(plan, scheduled, error)
            return lambda: lost
        self._progress.at(Operation.SAMPLE)
        sampling = [share for share in scheduled if share.sample]
        output: SamplerOutput | torch.Tensor | None = None
        found = masks.result() if masks is not None else {}
        failures = {slot: mask for slot, mask in found.items() if isinstance(mask, str)}
        if logits is not None and sampling:
            rows = [self._sampling_row(share, found.get(share.slot)) for share in sampling]
            try:
                output = self._sample(logits, rows)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                failures |= {share.slot: f"out of memory while sampling: {error}" for share in sampling}
        reading = None
        if self._late is not None and sampling and not isinstance(output, SamplerOutput):
            reading = self._late.keep(plan.step, sampling, self._shared(output, len(sampling)))
        elif self._shares_samples and sampling:
            assert not isinstance(output, torch.Tensor)
            self._share_samples(plan.step, sampling, output)

        def answer() -> StepResult:
            tokens = None if reading is None else reading.wait()  # other ranks wait too: their step is done then
            read = output_of(tokens) if isinstance(output, torch.Tensor) and tokens is not None else output
            sampled = _usable(sampling, read, failures) if isinstance(read, SamplerOutput) else []
            failed = [*errors, *(SlotError(slot, message) for slot, message in failures.items())]
            return StepResult.of(plan.epoch, plan.step, self._mesh.rank, sampled, prompt_logprobs, failed, pooled)

        return answer

    def _sample(self, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> SamplerOutput | torch.Tensor:
        """On the device still, where nothing is wanted of the logits but tokens."""
        if self._late is None or any(row.params.logprobs is not None for row in rows):
            return sample(logits, rows)
        return choose(logits, rows)

    def _shared(self, tokens: torch.Tensor | None, count: int) -> torch.Tensor:
        """[count] int64 on the device: the sampling rank's, for all ranks that divide its layers. Zeros where it could
        not sample, so that plans already in flight can still be computed."""
        if tokens is None:
            tokens = torch.zeros(count, dtype=torch.int64, device=self._device)
        return self._mesh.tp.broadcast(tokens)

    def _sampling_row(self, share: ScheduledSlot, mask: GrammarMask | str | None) -> SamplingRow:
        """What is drawn for a slot whose grammar is broken means nothing."""
        state = share.state
        allowed = mask if isinstance(mask, GrammarMask) else None
        seen = self._seen.setdefault(share.slot, SeenTokens()) if has_penalties(state.sampling) else None
        return SamplingRow(share.slot, state.sampling, state.token_ids, state.num_prompt_tokens, allowed, seen)

    def _forward(self, scheduled: Sequence[ScheduledSlot]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states [T, hidden_size] and, on the sampling rank, the sampling slots' logits [R, vocab]."""
        batch = build_batch(scheduled, len(self._groups), self._block_size, self._device)
        if self._late is not None:
            self._late.fill(batch.token_ids, scheduled)
        return self._run_model(batch)

    def _run_model(self, batch: ForwardBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
        hidden = None if self._captured is None else self._captured.forward(batch)
        if hidden is None:
            attention = self._attention.plan(batch, self._groups, self._block_size)
            hidden = run_stage(self._model, self._mesh, batch, self._cache, attention)
        logits = self._model.logits(hidden[batch.logits_rows]) if len(batch.logits_rows) else None
        return hidden, logits

    def _prompt_logprobs(self, hidden: torch.Tensor, scheduled: Sequence[ScheduledSlot]) -> list[PromptLogprobs]:
        """Every rank takes part in the logits; only the sampling rank gets a list."""
        found: list[PromptLogprobs] = []
        first_row = 0
        for share in scheduled:
            state = share.state
            last = min(share.start + share.num_tokens + 1, state.num_prompt_tokens)
            num_top = state.sampling.prompt_logprobs
            if num_top is not None and last > share.start + 1:
                targets = state.token_ids[share.start + 1 : last]
                entries = self._logprobs_of(hidden[first_row : first_row + len(targets)], targets, num_top)
                if entries:
                    found.append(PromptLogprobs(share.slot, share.start + 1, entries))
            first_row += share.num_tokens
        return found

    def _logprobs_of(self, hidden: torch.Tensor, targets: list[int], num_top: int) -> list[TopLogprobs]:
        entries: list[TopLogprobs] = []
        for start in range(0, len(targets), _PROMPT_LOGPROB_ROWS):
            part = targets[start : start + _PROMPT_LOGPROB_ROWS]
            logits = self._model.logits(hidden[start : start + len(part)])
            if logits is not None:
                entries += top_logprobs(logits, part, [num_top] * len(part))
        return entries

    def _share_samples(self, step: int, sampling: Sequence[ScheduledSlot], output: SamplerOutput | None) -> None:
        """A slot that failed gets token 0, so that plans already in flight can still be computed."""
        token_ids = output.token_ids if output is not None else [0] * len(sampling)
        if self._mesh.tp.size > 1:
            token_ids = self._mesh.tp.broadcast(to_device(np.array(token_ids), self._device)).tolist()
        for share, token_id in zip(sampling, token_ids, strict=True):
            self._slots.record_sample(step, share.slot, token_id)

    def _out_of_memory(self, plan: StepPlan, scheduled: Sequence[ScheduledSlot], error: RuntimeError) -> StepResult:
        """The requests of this step end; the rank lives on. Only where it is the whole gang."""
        if self._shares_samples:
            for share in scheduled:
                if share.sample:
                    self._slots.record_sample(plan.step, share.slot, 0)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        errors = [SlotError(share.slot, f"out of memory in step {plan.step}: {error}") for share in scheduled]
        return StepResult(plan.epoch, plan.step, self._mesh.rank, errors=errors)


def _wants_rest(plan: StepPlan) -> bool:
    """Whether nothing may be on its way when the plan is taken in: it names tokens by their values, which continue a
    history, or changes weights."""
    names_values = any(share.token_ids for batch in plan.batches for share in batch.scheduled)
    return names_values or bool(plan.adapters or plan.experts)


def _looks_back(sampling: SamplingParams) -> bool:
    """Whether the next token depends on the values of those before."""
    return sampling.grammar is not None or has_penalties(sampling)


def is_out_of_memory(error: RuntimeError) -> bool:
    """torch has a class for CUDA; for CPU memory only the message tells."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _usable(sampling: Sequence[ScheduledSlot], output: SamplerOutput, failures: dict[int, str]) -> list[SampledToken]:
    """The tokens of slots that have not failed; ``failures`` gets those with unusable logits too."""
    sampled = []
    for share, token_id, logprobs, valid in zip(sampling, output.token_ids, output.logprobs, output.valid, strict=True):
        if not valid:
            position = share.start + share.num_tokens
            failures.setdefault(share.slot, f"the logits for position {position} are NaN or infinite")
        elif share.slot not in failures:
            sampled.append(SampledToken(share.slot, token_id, logprobs))
    return sampled
