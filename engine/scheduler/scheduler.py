"""Decides what one dp group computes in the next step, and takes in what it computed.

A step is so many tokens for each request; prefill and decode are not told apart. A request that decodes has one token
to compute, a prompt has many, and gets as many as the step's budget and the free blocks allow (chunked prefill), and
no more than keeps the others' gap between tokens within bounds.
Running requests come first, each gets at least one token; then waiting ones are admitted in the queue's order. When
blocks run out the last to be served gives all its blocks back and is computed again later (recomputation).
"""

from collections import deque
from collections.abc import Sequence

from engine.config import CacheConfig, KvGroupConfig, SchedulerConfig
from engine.messages import NO_STEP, BatchPlan, NewRequest, StepResult
from engine.outputs import Outputs
from engine.packed import unpack
from engine.request import FinishReason, Output
from engine.scheduler.block_pool import BlockPool
from engine.scheduler.block_tables import BlockTables
from engine.scheduler.fair_queue import FairQueue
from engine.scheduler.integrity import check_requests, held_blocks
from engine.scheduler.latency_budget import LatencyBudget, TokenBudget
from engine.scheduler.lockstep import Lockstep
from engine.scheduler.make_way import Needs, num_owed, who_makes_way
from engine.scheduler.micro_batch import Work
from engine.scheduler.new_output import embedding_of, output_of
from engine.scheduler.policy import in_order, victim_of
from engine.scheduler.request_state import NO_SLOT, RequestState
from engine.scheduler.share import share, share_next
from engine.scheduler.step_in_flight import Draft, PromptEntries, StepInFlight, requests_of

_LOOKED_AT_PER_STEP = 1024
"""Blocks, on average, of prefixes found for a request that does not fit yet."""


class Scheduler:
    """The requests and the blocks of one dp group, in one epoch. Calls come from one thread.

    Args:
        input_references: whether a plan may refer to a token that a plan in flight will sample (asynchronous
            scheduling). Without, a decoding request is in one plan in flight at most (pipeline micro-batches).
    """

    def __init__(
        self,
        config: SchedulerConfig,
        cache: CacheConfig,
        kv_groups: Sequence[KvGroupConfig],
        *,
        input_references: bool = True,
    ) -> None:
        self._config = config
        self._input_references = input_references
        self._pool = BlockPool(cache.num_blocks)
        self._tables = BlockTables(self._pool, kv_groups, cache.block_size, keeps_prefixes=cache.keeps_prefixes)
        self._waiting = FairQueue()
        self._running: list[RequestState] = []  # in order
        self._lockstep = Lockstep()
        self._latency_budget = LatencyBudget(config.max_step_stretch)
        self._free_slots = list(range(config.max_num_seqs - 1, -1, -1))
        self._removed: list[int] = []  # slots that the ranks must be told are free
        self._in_flight: deque[StepInFlight] = deque()
        self._draft: Draft | None = None
        self._stop_ids: set[int] = set()
        """The stop tokens of all running requests, and of some that have ended."""
        self.num_preemptions = 0
        self.num_tokens_admitted = self.num_tokens_cached = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_blocks(self) -> int:
        return self._pool.num_usable

    @property
    def num_blocks_used(self) -> int:
        return self._pool.num_usable - self._pool.num_free

    def fits(self, state: RequestState) -> bool:
        """Whether the whole cache could hold this request to its end. The last token is never computed."""
        return self._tables.num_needed(state.max_num_tokens - 1) <= self._pool.num_usable

    def num_cached(self, state: RequestState) -> int:
        """Leading tokens of a new request that this group holds already."""
        return self._tables.num_cached(state)

    def add(self, state: RequestState) -> None:
        assert self.fits(state), f"request {state.request_id} can never fit"
        self._waiting.add(state)

    def abort(self, state: RequestState) -> None:
        """No later plan names this request; what plans in flight compute for it is discarded."""
        self._finish(state)
        self._forget_finished()

    def in_flight(self) -> list[RequestState]:
        """What is being computed; some of it may have ended meanwhile."""
        return requests_of(self._in_flight)

    # ---- schedule -------------------------------------------------------------------------------------------------

    def draft(self, step: int) -> BatchPlan | None:
        """Begins the batch of plan ``step`` before that plan can leave: what the running requests compute in it. None
        where they compute nothing. ``schedule`` returns this very object unless something has changed meanwhile.
        """
        draft = self._begin(step)
        if draft.batch.is_idle:
            return None
        draft.batch.removed.extend(self._removed)
        self._removed.clear()
        self._draft = draft
        return draft.batch

    def _begin(self, step: int) -> Draft:
        flight = StepInFlight(step)
        self._share_out()
        apart = self._apart_from_lockstep()
        batch = BatchPlan(removed=[], new=[], scheduled=[], decodes=self._lockstep.advance(flight))
        is_decoding = bool(self._lockstep) or any(self._num_schedulable(state) == 1 for state in apart)
        num_decodes = len(self._running) if is_decoding else 0
        budget = self._latency_budget.of_step(self._config.max_num_batched_tokens, num_decodes)
        if not self._input_references:
            work = Work.of(self._running, self._waiting, self._config)
            budget.narrow(work.max_decodes(len(self._in_flight)), work.max_prompt_tokens)
        budget.left -= len(self._lockstep)
        short_of_blocks = self._schedule_running(apart, batch, flight, budget)
        return Draft(batch, flight, budget, short_of_blocks)

    def _share_out(self) -> None:
        """Takes slots and blocks from tenants that have more than their share, for the first in the queue."""
        self._waiting.settle()
        while self._waiting.is_shared and (first := self._waiting.first()) is not None and not first.num_pending:
            has_blocks = self._surely_fits(first, self._pool.num_free + self._pool.num_deferred)
            needs = Needs(not self._free_slots, not has_blocks, self._config.max_num_seqs)
            if (victim := who_makes_way(first, self._waiting.live_accounts, needs)) is None:
                return
            self._preempt(victim)

    def _surely_fits(self, state: RequestState, num_blocks: int) -> bool:
        return self._tables.num_needed(len(state.token_ids)) + self._num_reserved(state) <= num_blocks

    def _num_reserved(self, state: RequestState) -> int:
        return len(self._running) + num_owed(state, self._waiting.live_accounts, self._tables.num_needed)

    def _apart_from_lockstep(self) -> list[RequestState]:
        """The running requests that must be looked at for the next plan: all, where blocks may run out in it."""
        self._lockstep.release_due()
        apart = [state for state in self._running if state.lockstep_end == NO_STEP]
        num_tokens = min(self._config.max_num_batched_tokens, sum(map(self._num_schedulable, apart)))
        self._has_room = self._tables.have_room(num_tokens, len(apart))
        if self._has_room:
            return apart
        self._lockstep.dissolve()
        return self._running.copy()

    def is_final(self, result: StepResult) -> bool:
        """Whether the draft can leave before ``result``, the next to be taken in: it ends no request of the draft, and
        nobody came or went meanwhile."""
        draft = self._draft
        if draft is None or result.errors or self._removed or (self._waiting and self._may_admit(draft)):
            return False
        return self._stop_ids.isdisjoint(unpack(result.token_ids) + [sampled.token_id for sampled in result.sampled])

    def schedule(self, step: int) -> BatchPlan | None:
        """The batch of plan ``step``, or None where nothing can be computed until a plan in flight returns."""
        draft, self._draft = self._draft or self._begin(step), None
        assert draft.flight.step == step
        batch, flight = draft.batch, draft.flight
        if self._removed:
            batch, self._removed = draft.without(self._removed), []
        if self._waiting and self._may_admit(draft):
            admitting = BatchPlan(batch.removed, [], batch.scheduled.copy(), decodes=batch.decodes)
            self._admit(admitting, flight, draft.budget)
            batch = admitting if admitting.new else batch
        if batch.is_idle:
            self._removed = batch.removed
            self._pool.withdraw(step)
            return None
        self._in_flight.append(flight)
        return batch

    def _may_admit(self, draft: Draft) -> bool:
        return bool(self._free_slots) and not draft.short_of_blocks and draft.budget.for_prompts > 0

    def schedule_idle(self, step: int) -> BatchPlan:
        """An empty batch, for a step in which only other dp groups have work."""
        removed, self._removed = self._removed, []
        self._in_flight.append(StepInFlight(step))
        return BatchPlan(removed=removed, new=[], scheduled=[])

    def _schedule_running(
        self, apart: list[RequestState], batch: BatchPlan, flight: StepInFlight, budget: TokenBudget
    ) -> bool:
        """Returns whether some request had to go without blocks."""
        short_of_blocks = False
        index = 0
        while index < len(apart):
            state = apart[index]
            num_tokens = self._num_schedulable(state)
            if num_tokens == 1 and state.num_pending and state.num_computed < state.num_block_tokens:
                share_next(state, batch, flight, self._tables)
                budget.left -= 1
                index += 1
                continue
            if num_tokens == 1 and budget.decodes_left == 0:
                num_tokens = 0
            if num_tokens > 1:  # a prompt leaves one token to each request after it
                most = budget.prompt_tokens(state.num_computed)
                if num_left := self._num_left_to_others(state, apart[index + 1 :]):
                    most = max(1, most - num_left)
                num_tokens = min(num_tokens, most, budget.left - (len(apart) - index - 1))
            if num_tokens > 0 and state.num_computed + num_tokens > state.num_block_tokens:
                room = self._tables.room(state)
                if room < num_tokens:
                    short_of_blocks = True
                    num_tokens = min(num_tokens, room or self._make_room(apart, index))
            if num_tokens > 0:
                budget.take(num_tokens, state.num_computed)
                share(state, num_tokens, batch, flight, self._tables)
            if state.slot != NO_SLOT:  # else it was itself the victim, and the next has moved up
                index += 1
        if self._has_room and self._input_references:
            for state in apart:
                self._lockstep.join(state, flight.step)
        return short_of_blocks

    def _num_schedulable(self, state: RequestState) -> int:
        if state.num_pending and not self._input_references:
            return 0
        num_tokens = len(state.token_ids) + state.num_pending
        return num_tokens - state.num_computed if num_tokens < state.max_num_tokens else 0

    def _num_left_to_others(self, state: RequestState, later: list[RequestState]) -> int:
        """Tokens that a prompt leaves to prompts that go before it: to one that waits and surely fits, and to running
        ones of other tenants, whose turn in the step comes after it."""
        num_left = 0
        if self._waiting.is_shared:
            num_left = sum(self._num_schedulable(other) for other in later if self._waiting.goes_before(other, state))
        first = self._waiting.first() if self._free_slots else None
        if first is not None and not first.num_pending and self._waiting.goes_before(first, state):
            num_left += len(first.token_ids) if self._surely_fits(first, self._pool.num_free) else 0
        return num_left

    def _make_room(self, apart: list[RequestState], index: int) -> int:
        """How many tokens the request at ``index`` has room for, after preempting from those not yet scheduled. 0: it
        waits for blocks that plans in flight still name, or was itself preempted."""
        state = apart[index]
        num_groups = len(state.block_tables)
        while (room := self._tables.room(state)) <= 0:
            if self._pool.num_free + self._pool.num_deferred >= num_groups:
                return 0
            victim = victim_of(apart[index:])
            apart.remove(victim)
            self._preempt(victim)
            if victim is state:
                return 0
        return room

    def _preempt(self, victim: RequestState) -> None:
        """Back to the queue with all its tokens. A token still being sampled for it is waited for, not lost."""
        self.num_preemptions += 1
        self._running.remove(victim)
        self._leave_slot(victim)
        self._waiting.put_back(victim)

    def _admit(self, batch: BatchPlan, flight: StepInFlight, budget: TokenBudget) -> None:
        """Admits in the queue's order, and nobody past one that does not fit, so that nobody starves. One is admitted
        when all its known tokens fit, with one block left for each running request, so that it is not preempted again
        at once. While a prompt is only partly scheduled nobody is admitted behind it."""
        while (state := self._waiting.first()) is not None:
            if budget.for_prompts <= 0 or not self._free_slots or state.num_pending:
                break
            others_wait = bool(self._in_flight) or not batch.is_idle
            if others_wait and flight.step < state.look_again_at:
                break
            prefix = self._tables.find_prefix(state, all_at_once=not others_wait)
            if prefix is None:
                break
            if self._tables.num_to_take(len(state.token_ids), prefix) + self._num_reserved(state) > self._pool.num_free:
                # Looking at a long prefix takes time, so it is not looked at in every step.
                state.look_again_at = flight.step + len(prefix[0]) // _LOOKED_AT_PER_STEP
                break
            self._waiting.take()
            batch.new.append(self._enter_slot(state, flight.step, prefix))
            num_tokens = len(state.token_ids) - state.num_computed
            num_tokens = max(1, min(num_tokens, budget.prompt_tokens(state.num_computed), self._tables.room(state)))
            budget.take(num_tokens, state.num_computed)
            share(state, num_tokens, batch, flight, self._tables)
            if state.num_computed < len(state.token_ids):
                break
        if batch.new:
            self._running = in_order(self._running)

    # ---- update ---------------------------------------------------------------------------------------------------

    def update(self, result: StepResult) -> Outputs:
        """Takes in the result of the oldest plan in flight. At most one Output per request.

        Raises ProtocolViolation where the result is not what that plan asked for.
        """
        flight = self._in_flight.popleft()
        flight.check_slots(result)
        prompt_logprobs = flight.new_prompt_logprobs(result)
        # From here on nothing raises: what was taken in is always given out.
        self._pool.step_returned(result.step)
        self._latency_budget.observe(flight.num_decodes, flight.prompts, result.duration_us * 1e-6)
        self._tables.keep_filled(flight, {error.slot for error in result.errors})
        outputs = flight.begin_outputs()
        is_plain = not (prompt_logprobs or result.sampled or result.errors or flight.may_end)
        if is_plain and self._stop_ids.isdisjoint(token_ids := unpack(result.token_ids)):
            flight.take_tokens(token_ids, outputs)
        else:
            self._take_each(flight, result, prompt_logprobs, outputs)
        for slot, prefilling in flight.prefilling.items():
            logprobs = prompt_logprobs.get(slot)
            if prefilling.finished or (logprobs is None and prefilling.has_begun):
                continue
            # The first chunk says, with an output of its own, that the request waits no more.
            prefilling.has_begun = True
            prefilling.num_prompt_logprobs += len(logprobs or ())
            outputs.append(Output(prefilling.request_id, [], prompt_logprobs=logprobs))
        return outputs

    def _take_each(
        self, flight: StepInFlight, result: StepResult, prompt_logprobs: PromptEntries, outputs: Outputs
    ) -> None:
        """Takes in what a step gave where a request may end, or has log-probabilities."""
        for error in result.errors:
            failed = flight.take_failed(error.slot)
            if not failed.finished:
                self._finish(failed)
                outputs.append(Output(failed.request_id, [], FinishReason.ERROR, error=error.message))
        for sampled in result.all_sampled:
            state = flight.sampling[sampled.slot]
            if not state.finished:
                state.token_ids.append(sampled.token_id)
                state.num_pending -= 1
                output = output_of(state, sampled, prompt_logprobs.get(sampled.slot))
                if output.finish_reason is not None:
                    self._finish(state)
                outputs.append(output)
        for pooled in result.pooled:
            state = flight.embedding[pooled.slot]
            if not state.finished:
                self._finish(state)
                outputs.append(embedding_of(state, pooled))
        self._forget_finished()

    # ---- slots ----------------------------------------------------------------------------------------------------

    def _enter_slot(self, state: RequestState, step: int, prefix: list[list[int]]) -> NewRequest:
        state.slot = self._free_slots.pop()
        is_first_entry = state.entry_step == NO_STEP
        state.entry_step = step
        state.num_sent = len(state.token_ids)
        self._tables.open(state, prefix)
        if is_first_entry:
            state.num_cached_tokens = min(state.num_computed, state.num_prompt_tokens)
        self.num_tokens_admitted += len(state.token_ids)
        self.num_tokens_cached += state.num_computed
        self._running.append(state)
        self._stop_ids.update(state.sampling.stop_token_ids)
        return state.as_new(prefix)

    def _leave_slot(self, state: RequestState) -> None:
        self._lockstep.leave(state)
        self._tables.release_all(state)
        self._free_slots.append(state.slot)
        self._removed.append(state.slot)
        state.slot = NO_SLOT
        state.num_computed = 0

    def _finish(self, state: RequestState) -> None:
        assert not state.finished, f"request {state.request_id} ended twice"
        state.finished = True
        for flight in self._in_flight:
            flight.may_end = True
        self._waiting.remove(state)
        if state.slot != NO_SLOT:
            self._leave_slot(state)

    def _forget_finished(self) -> None:
        self._running = [state for state in self._running if not state.finished]
        if not self._running and not self._in_flight:
            self._stop_ids.clear()

    def check_integrity(self) -> None:
        """Asserts what must hold between any two calls."""
        self._pool.check_integrity(held_blocks(self._running))
        check_requests(self._running, list(self._waiting))
        slots = self._free_slots + [state.slot for state in self._running]
        assert sorted(slots) == list(range(self._config.max_num_seqs)), "a slot was lost or given away twice"
        assert len(self._removed) == len(set(self._removed)), "a slot is removed twice"
        assert self._running == in_order(self._running), "running requests are out of order"
