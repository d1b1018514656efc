"""A gang without a model: ranks that follow the step protocol and watch over every byte of a pretended KV cache.

Plans take effect on a rank's memory as early as they can (when submitted) and end as late as they can (when somebody
waits for their result); every read is checked at both ends. So a block that is given away while a plan in flight still
names it is caught, as is a block freed too early, a gap, and a table that points to somebody else's tokens.
"""

import zlib
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import msgspec
import numpy as np
import numpy.typing as npt

from engine.config import KvGroupConfig
from engine.errors import RankFailure
from engine.executor.grammar_masks import GrammarMasks, StepMasks
from engine.executor.sampling_row import GrammarMask
from engine.messages import (
    NULL_BLOCK,
    AdapterOutcome,
    LoadAdapter,
    PooledState,
    PromptLogprobs,
    SampledToken,
    SlotError,
    StepPlan,
    StepResult,
    decode_from_rank,
    decode_to_rank,
    encode,
)
from engine.request import Pooling, SamplingParams, TopLogprobs
from engine.slot_table import ScheduledSlot, SlotState, SlotTable

Allowed = npt.NDArray[np.bool_]
"""What a request's grammar lets follow: [vocab]."""


def next_token(
    sampling: SamplingParams,
    token_ids: Sequence[int],
    num_prompt_tokens: int,
    vocab_size: int,
    allowed: Allowed | None = None,
) -> int:
    """The oracle: a token that depends on the seed, the choice, the whole history and what is allowed behind it, and on
    nothing else."""
    digest = zlib.crc32(repr((sampling.seed, sampling.choice, tuple(token_ids))).encode())
    if allowed is not None:
        candidates = np.flatnonzero(allowed)
        return int(candidates[digest % len(candidates)])
    token_id = digest % vocab_size
    if len(token_ids) - num_prompt_tokens < sampling.min_tokens:
        while token_id in sampling.stop_token_ids:
            token_id = (token_id + 1) % vocab_size
    return token_id


def sequential_tokens(
    sampling: SamplingParams,
    token_ids: Sequence[int],
    num_prompt_tokens: int,
    vocab_size: int,
    allowed_behind: Callable[[Sequence[int]], Allowed] | None = None,
) -> list[int]:
    """What the request generates, alone and one token at a time. ``allowed_behind``: of its grammar, by what has been
    generated."""
    history = list(token_ids)
    while len(history) - num_prompt_tokens < sampling.max_tokens:
        allowed = None if allowed_behind is None else allowed_behind(history[num_prompt_tokens:])
        history.append(next_token(sampling, history, num_prompt_tokens, vocab_size, allowed))
        if history[-1] in sampling.stop_token_ids and len(history) - num_prompt_tokens > sampling.min_tokens:
            break
    return history[len(token_ids) :]


def logprobs_at(token_ids: Sequence[int], position: int) -> TopLogprobs:
    """What is pretended of the token there: it depends on the position and the token."""
    logprob = -float(position) - token_ids[position] / 1024
    return TopLogprobs(logprob, 1, [token_ids[position]], [logprob])


def embedding_of(pooling: Pooling, token_ids: Sequence[int]) -> bytes:
    """What is pretended of a prompt: it depends on all of its tokens and, as a mean does, on every beginning of it."""
    first = len(token_ids) if pooling is Pooling.LAST else 1
    return _packed(_hidden(token_ids, end) for end in range(first, len(token_ids) + 1))


def _hidden(token_ids: Sequence[int], end: int) -> int:
    return zlib.crc32(array("I", token_ids[:end]).tobytes())


def _packed(hidden: Iterable[int]) -> bytes:
    return sum(hidden).to_bytes(8, "little")


Cell = tuple[int, int, int, int]
"""KV group, block, offset within the block, and what must be there: a number made of the tokens so far."""


def _cell_value(state: SlotState, position: int, adapter_path: str) -> int:
    """Keys and values depend on all tokens so far and on the adapter, not on the request."""
    return zlib.crc32(array("I", state.token_ids[: position + 1]).tobytes(), zlib.crc32(adapter_path.encode()))


@dataclass
class SimulatedRank:
    """One rank: its slots, its memory, and what its plans in flight read from there.

    ``records_samples``: whether it learns the tokens that are sampled (all ranks do where plans may refer to them, the
    sampling rank always); ``fails_at`` positions of a request (by seed) answer with a SlotError, ``dies_at`` positions
    kill the rank. ``adapter_of``: path of the adapter that a request (by seed) must have; ``broken_adapters``: paths
    that cannot be loaded. ``grammars``: of requests that have one.
    """

    table: SlotTable
    kv_groups: Sequence[KvGroupConfig]
    block_size: int
    vocab_size: int
    records_samples: bool
    fails_at: set[tuple[int, int]] = field(default_factory=set)
    dies_at: set[tuple[int, int]] = field(default_factory=set)
    has_died: bool = False
    memory: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    """(block, offset) to (KV group, value): blocks of all groups are of one pool."""
    adapter_of: dict[int, str] = field(default_factory=dict)
    broken_adapters: set[str] = field(default_factory=set)
    adapters: dict[int, str] = field(default_factory=dict)
    """Adapter slot to path."""
    grammars: GrammarMasks | None = None
    dp_group: int = 0
    sums: dict[int, int] = field(default_factory=dict)
    """By slot: of what a mean is made of, so far."""

    def compute(self, plan: StepPlan) -> tuple[StepResult, list[Cell]]:
        """The result of a plan, and all cells that it read."""
        scheduled = self.table.apply(plan)
        for slot in plan.batches[self.dp_group].removed:
            self.sums.pop(slot, None)
        outcomes = self._change_adapters(plan)
        for share in scheduled:
            path = self.adapters.get(share.state.adapter, "")
            assert path == self.adapter_of.get(share.state.sampling.seed, ""), f"slot {share.slot} has adapter {path!r}"
            self._write(share)
        cells = [cell for share in scheduled for cell in self._cells_read(share)]
        self.check(cells)
        result = StepResult(
            plan.epoch, plan.step, rank=0, sampled=[], prompt_logprobs=[], errors=[], adapters=outcomes, pooled=[]
        )
        masks = self._masks(plan, scheduled)
        for share in scheduled:
            self._answer(share, plan.step, result, masks)
        packed = StepResult.of(
            plan.epoch, plan.step, 0, result.sampled, result.prompt_logprobs, result.errors, result.pooled
        )
        return msgspec.structs.replace(packed, adapters=outcomes), cells

    def _masks(self, plan: StepPlan, scheduled: Sequence[ScheduledSlot]) -> StepMasks:
        """As the model runner has them made."""
        if self.grammars is None:
            return {}
        self.grammars.forget(plan.batches[self.dp_group].removed)
        masks = self.grammars.begin(scheduled)
        return {} if masks is None else masks.result()

    def _change_adapters(self, plan: StepPlan) -> list[AdapterOutcome]:
        outcomes = []
        for change in plan.adapters:
            if isinstance(change, LoadAdapter):
                self.adapters[change.slot] = change.path
                error = "it is broken" if change.path in self.broken_adapters else ""
                outcomes.append(AdapterOutcome(0, change.slot, 0 if error else len(change.path), error))
            else:
                del self.adapters[change.slot]
        return outcomes

    def check(self, cells: list[Cell]) -> None:
        for group, block, offset, value in cells:
            found = self.memory.get((block, offset))
            assert found == (group, value), f"block {block}, offset {offset}: {found} instead of {(group, value)}"

    def _cell(self, share: ScheduledSlot, group: int, position: int) -> Cell:
        block = share.state.block_tables[group][position // self.block_size]
        assert block != NULL_BLOCK, f"slot {share.slot} reads position {position}, whose block was given back"
        return (
            group,
            block,
            position % self.block_size,
            _cell_value(share.state, position, self.adapters.get(share.state.adapter, "")),
        )

    def _write(self, share: ScheduledSlot) -> None:
        for group in range(len(self.kv_groups)):
            for position in range(share.start, share.start + share.num_tokens):
                _, block, offset, value = self._cell(share, group, position)
                self.memory[block, offset] = (group, value)

    def _cells_read(self, share: ScheduledSlot) -> list[Cell]:
        cells = []
        for group, config in enumerate(self.kv_groups):
            first = 0 if config.chunk_size is None else share.start // config.chunk_size * config.chunk_size
            if config.window_size is not None:
                first = max(0, share.start - config.window_size + 1)
            cells += [self._cell(share, group, p) for p in range(first, share.start + share.num_tokens)]
        return cells

    def _answer(self, share: ScheduledSlot, step: int, result: StepResult, masks: StepMasks) -> None:
        state, mask = share.state, masks.get(share.slot)
        end = share.start + share.num_tokens
        if state.sampling.prompt_logprobs is not None and share.start + 1 < state.num_prompt_tokens:
            positions = range(share.start + 1, min(end + 1, state.num_prompt_tokens))
            entries = [logprobs_at(state.token_ids, p) for p in positions]
            result.prompt_logprobs.append(PromptLogprobs(share.slot, share.start + 1, entries))
        if any((state.sampling.seed, p) in self.dies_at for p in range(share.start, end)):
            self.has_died = True
        failed = any((state.sampling.seed, p) in self.fails_at for p in range(share.start, end))
        if failed:
            result.errors.append(SlotError(share.slot, f"position {end - 1} is not a number"))
        if isinstance(mask, str):
            failed = True
            result.errors.append(SlotError(share.slot, mask))
        if share.sample:
            allowed = mask.allowed if isinstance(mask, GrammarMask) else None
            token_id = next_token(state.sampling, state.token_ids, state.num_prompt_tokens, self.vocab_size, allowed)
            if self.records_samples:
                self.table.record_sample(step, share.slot, token_id)
            if not failed:
                history = [*state.token_ids[:end], token_id]
                logprobs = None if state.sampling.logprobs is None else logprobs_at(history, end)
                result.sampled.append(SampledToken(share.slot, token_id, logprobs))
        if state.sampling.pooling is not None:
            self._embed(share, state.sampling.pooling, result, failed)

    def _embed(self, share: ScheduledSlot, pooling: Pooling, result: StepResult, failed: bool) -> None:
        """As a real rank does: chunk by chunk, of what it computes itself."""
        end = share.start + share.num_tokens
        first = share.start if pooling is Pooling.MEAN else end - 1
        hidden = sum(_hidden(share.state.token_ids, position + 1) for position in range(first, end))
        if pooling is Pooling.MEAN:
            hidden = self.sums[share.slot] = self.sums.get(share.slot, 0) + hidden
        if share.embeds and not failed:
            result.pooled.append(PooledState(share.slot, _packed([hidden])))


class LateFuture(Future[list[StepResult]]):
    """Ends when somebody waits for it, and all before it end first."""

    def __init__(self, finish: Callable[["LateFuture"], None]) -> None:
        super().__init__()
        self._finish = finish

    def result(self, timeout: float | None = None) -> list[StepResult]:
        if not self.done():
            self._finish(self)
        return super().result(timeout=0)


@dataclass
class Flight:
    plan: StepPlan
    future: LateFuture
    results: list[StepResult]
    read: list[tuple[SimulatedRank, list[Cell]]]
    blocks: list[set[int]]
    """Per dp group, every block that the plan reads or writes."""


class SimulatedGang:
    """An Executor over ``ranks_per_group`` simulated ranks in each dp group; the first one samples.

    Args:
        fails_at: (seed, position) pairs whose computation answers with a SlotError.
        dies_at: (seed, position) pairs whose computation kills a rank.
        adapter_of: path of the adapter that each request, by seed, must be computed with.
        broken_adapters: paths that the last rank cannot load.
        new_grammars: makes one rank's matchers; None where no request has a grammar.
        depth: plans that may be in flight.
        input_references: whether plans may refer to samples, so that all ranks have to know them.
    """

    def __init__(
        self,
        *,
        num_slots: int,
        kv_groups: Sequence[KvGroupConfig],
        block_size: int,
        num_blocks: int,
        vocab_size: int,
        depth: int,
        epoch: int = 0,
        num_dp_groups: int = 1,
        ranks_per_group: int = 2,
        input_references: bool = True,
        fails_at: set[tuple[int, int]] | None = None,
        dies_at: set[tuple[int, int]] | None = None,
        adapter_of: dict[int, str] | None = None,
        broken_adapters: set[str] | None = None,
        new_grammars: Callable[[], GrammarMasks] | None = None,
    ) -> None:
        self.depth = depth
        self.dead = False
        self._prepared: tuple[StepPlan, bytes] | None = None
        self.plans: list[StepPlan] = []
        self._flights: deque[Flight] = deque()
        self._groups = [
            [
                SimulatedRank(
                    table=SlotTable(
                        num_slots=num_slots,
                        kv_groups=kv_groups,
                        block_size=block_size,
                        num_blocks=num_blocks,
                        epoch=epoch,
                        dp_group=dp_group,
                    ),
                    kv_groups=kv_groups,
                    block_size=block_size,
                    vocab_size=vocab_size,
                    records_samples=input_references or index == 0,
                    fails_at=fails_at if fails_at is not None else set(),
                    dies_at=dies_at if dies_at is not None else set(),
                    adapter_of=adapter_of if adapter_of is not None else {},
                    grammars=None if new_grammars is None else new_grammars(),
                    dp_group=dp_group,
                )
                for index in range(ranks_per_group)
            ]
            for dp_group in range(num_dp_groups)
        ]
        if broken_adapters is not None:
            self._groups[-1][-1].broken_adapters = broken_adapters

    def prepare(self, plan: StepPlan) -> None:
        """What leaves later is what was prepared, even where it shares lists with the leader."""
        self._prepared = (plan, encode(plan))

    def submit(self, plan: StepPlan) -> Future[list[StepResult]]:
        assert len(self._flights) < self.depth, f"more than {self.depth} plans in flight"
        if self._prepared is not None and self._prepared[0] is plan:
            assert self._prepared[1] == encode(plan), "the plan was changed after it had been prepared"
        message = decode_to_rank(encode(plan))  # what travels is bytes: nothing is shared with the leader
        assert isinstance(message, StepPlan) and message == plan
        plan = message
        self.plans.append(plan)
        self._check_reuse(plan)
        results, read, blocks = [], [], []
        outcomes: list[AdapterOutcome] = []
        for ranks in self._groups:
            answers = [rank.compute(plan) for rank in ranks]
            self.dead |= any(rank.has_died for rank in ranks)
            assert all(cells == answers[0][1] for _, cells in answers), "ranks disagree about what they read"
            outcomes += [outcome for result, _ in answers for outcome in result.adapters]
            results.append(msgspec.structs.replace(answers[0][0], adapters=[]))
            read += [(rank, cells) for rank, (_, cells) in zip(ranks, answers, strict=True)]
            blocks.append({block for _, block, _, _ in answers[0][1]})
        results[0] = msgspec.structs.replace(results[0], adapters=outcomes)
        future = LateFuture(self._finish_up_to)
        self._flights.append(Flight(plan, future, results, read, blocks))
        return future

    def _check_reuse(self, plan: StepPlan) -> None:
        """A block given out by a plan is named by no plan in flight."""
        for dp_group, batch in enumerate(plan.batches):
            given = {b for share in batch.scheduled for ids in share.new_block_ids for b in ids}
            for flight in self._flights:
                named = given & flight.blocks[dp_group]
                assert not named, f"step {plan.step} gives out {named}, which step {flight.plan.step} still names"

    def _finish_up_to(self, future: LateFuture) -> None:
        while not future.done():
            flight = self._flights.popleft()
            if self.dead:
                flight.future.set_exception(RankFailure("a simulated rank died", rank=1))
                continue
            for rank, cells in flight.read:
                rank.check(cells)
            results = [decode_from_rank(encode(result)) for result in flight.results]
            flight.future.set_result([result for result in results if isinstance(result, StepResult)])

    def close(self) -> None:
        self.dead = True

    @property
    def adapters(self) -> dict[int, str]:
        """Slot to path, the same on all ranks."""
        held = [rank.adapters for ranks in self._groups for rank in ranks]
        assert all(adapters == held[0] for adapters in held)
        return held[0]

    @property
    def num_live_slots(self) -> int:
        return max(rank.table.num_live for ranks in self._groups for rank in ranks)
