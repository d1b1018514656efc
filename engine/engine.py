"""One replica's engine: requests in, outputs out, one step at a time. Knows neither tensors nor threads.

The leader's loop calls ``step`` as long as ``has_work``; ``add`` and ``abort`` come between two steps or from within
one (``news``), from the same thread. ``engine.scheduler`` decides who is computed in a step, ``engine.executor`` has it
computed. While ranks compute, the next plan is drafted; it leaves as soon as a result is there, before that is taken
in.
"""

import operator
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from engine.block_hash import root_hash
from engine.config import CacheConfig, KvGroupConfig, LoraConfig, SchedulerConfig
from engine.errors import ContextLengthExceeded, EngineFailure, InvalidRequest, Overloaded, ProtocolViolation
from engine.executor.executor import Executor, PendingResults
from engine.messages import ExpertChange, LayerExperts, StepPlan, StepResult
from engine.outputs import Outputs
from engine.request import AdapterInfo, FinishReason, Output, Request
from engine.scheduler.adapter_table import AdapterTable
from engine.scheduler.break_trials import BreakTrials
from engine.scheduler.dp_group import choose_group
from engine.scheduler.expert_balancer import ExpertBalancer
from engine.scheduler.expert_stats import ExpertStats
from engine.scheduler.request_state import RequestState
from engine.scheduler.scheduler import Scheduler
from engine.timeline import Clock, no_clock


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Over all dp groups. ``num_steps`` and ``num_preemptions`` count from the engine's start, over all epochs."""

    num_running: int
    num_waiting: int
    num_in_flight: int
    num_blocks: int
    num_blocks_used: int
    num_steps: int
    num_preemptions: int
    experts: ExpertStats | None = None
    """Of a mixture whose experts are on several ranks."""

    @property
    def kv_usage(self) -> float:
        """Used share of the KV blocks, 0 to 1."""
        return self.num_blocks_used / self.num_blocks if self.num_blocks else 0.0


class Engine:
    """Schedules requests over the dp groups of one gang and hands out what they produce.

    Args:
        executor: computes plans, in the epoch named by ``epoch``.
        kv_groups: the model's KV groups.
        vocab_size: token ids are 0 … vocab_size − 1.
        scheduler_config: bounds; each dp group has ``max_num_seqs`` slots and ``max_num_batched_tokens`` of its own.
        cache_config: ``num_blocks`` blocks (block 0 included) in each dp group.
        num_dp_groups: batches of a plan.
        epoch: of the gang; every change goes through ``reset``.
        input_references: see Scheduler.
        lora_config: bounds of adapters.
        experts: of a mixture whose experts are on several ranks.
        model_identity: differs for any two models whose KV blocks must not be taken for each other.
        clock: for the requests' timelines; decides nothing.
    """

    def __init__(
        self,
        *,
        executor: Executor,
        kv_groups: Sequence[KvGroupConfig],
        vocab_size: int,
        scheduler_config: SchedulerConfig,
        cache_config: CacheConfig,
        num_dp_groups: int = 1,
        epoch: int = 0,
        input_references: bool = True,
        lora_config: LoraConfig = LoraConfig(),
        experts: ExpertBalancer | None = None,
        model_identity: str = "",
        clock: Clock = no_clock,
    ) -> None:
        self._clock = clock
        self._kv_groups = tuple(kv_groups)
        self._vocab_size = vocab_size
        self._model_identity = model_identity
        self._config = scheduler_config
        self._num_dp_groups = num_dp_groups
        self._input_references = input_references
        self._adapters = AdapterTable(lora_config)
        self._experts = experts
        self._states: dict[str, RequestState] = {}
        self.trials = BreakTrials(scheduler_config.depth)
        self._outputs = Outputs()
        self._num_arrivals = 0
        self._num_steps_before = 0  # of earlier epochs
        self._num_preemptions_before = 0
        self._broken = False
        self._draft: StepPlan | None = None
        self._begin_epoch(epoch, executor, cache_config)

    def step(self, news: Callable[[], None] = lambda: None) -> Outputs:
        """Schedule → submit → update. Blocks until the oldest plan in flight has returned, and no longer.

        ``news`` is called then; what it adds or aborts counts for the plan that leaves next.
        Raises what the executor raised (RankFailure, ProtocolViolation); then only ``reset`` helps.
        """
        if self._broken:
            raise EngineFailure("a step failed before; the gang must form anew and the engine be reset")
        if self._outputs and not self._in_flight:
            # Not after the next step, which may break: a client whose one choice has ended has the others stopped.
            return self._take_outputs()
        self._broken = True  # until this step has come to its end
        if not self._in_flight:
            self._submit_plans()
        if self._in_flight:
            plan, future = self._in_flight[0]
            results = future.result()
            news()
            self._in_flight.popleft()
            draft = self._draft
            if draft is not None and self._is_final(results):
                self._submit_draft(draft)
            self._update(plan, results)
            self._submit_plans()
        else:
            assert self._outputs or not self._states, "requests are waiting, and nothing is in flight to wait for"
        self._make_draft()
        self._broken = False
        return self._take_outputs()

    def _take_outputs(self) -> Outputs:
        outputs, self._outputs = self._outputs, Outputs()
        return outputs

    def _submit_plans(self) -> None:
        for state in self.trials.released(self._states):
            self._schedulers[state.dp_group].add(state)
        while len(self._in_flight) < self._config.depth and (plan := self._schedule()) is not None:
            self._in_flight.append((plan, self._executor.submit(plan)))

    def _make_draft(self) -> None:
        """Makes and encodes the plan that may leave when the oldest in flight returns."""
        self._draft = None
        if self._in_flight and self._input_references:
            batches = [scheduler.draft(self._next_step) for scheduler in self._schedulers]
            drafted = [batch for batch in batches if batch is not None]
            if len(drafted) == len(batches):
                self._draft = StepPlan(self._epoch, self._next_step, drafted, expert_table=self._expert_table)
                self._executor.prepare(self._draft)

    def _is_final(self, results: list[StepResult]) -> bool:
        """Whether the draft is the next plan, whatever else these results bring."""
        if len(results) != self._num_dp_groups or self._adapters.has_work:
            return False
        if self._experts is not None and self._experts.has_changes:
            return False
        return all(scheduler.is_final(result) for scheduler, result in zip(self._schedulers, results, strict=True))

    def _submit_draft(self, draft: StepPlan) -> None:
        """As it is: the schedulers have nothing to add to it."""
        for scheduler in self._schedulers:
            scheduler.schedule(self._next_step)
        self._draft = None
        self._next_step += 1
        self._in_flight.append((draft, self._executor.submit(draft)))

    def _schedule(self) -> StepPlan | None:
        step, draft = self._next_step, self._draft
        batches = [scheduler.schedule(step) for scheduler in self._schedulers]
        changes = self._adapters.take_changes(self._used_adapters()) if self._adapters.has_work else []
        if all(batch is None for batch in batches) and not changes:
            return None
        self._next_step += 1
        moves = self._expert_changes()
        if draft is not None and not changes and not moves and all(map(operator.is_, batches, draft.batches)):
            return draft
        return StepPlan(
            self._epoch,
            step,
            [
                scheduler.schedule_idle(step) if batch is None else batch
                for scheduler, batch in zip(self._schedulers, batches, strict=True)
            ],
            changes,
            moves,
            self._expert_table,
        )

    @property
    def _expert_table(self) -> int:
        return 0 if self._experts is None else self._experts.table

    def _expert_changes(self) -> list[ExpertChange]:
        """Adapters are loaded for the experts that a rank has, so these stay as long as there is any."""
        if self._experts is None or not self._experts.has_changes:
            return []
        return self._experts.take_changes(may_move=self._adapters.is_empty)

    def _used_adapters(self) -> set[int]:
        return {state.adapter for state in self._states.values()}

    def _update(self, plan: StepPlan, results: list[StepResult]) -> None:
        if [(result.epoch, result.step) for result in results] != [(plan.epoch, plan.step)] * self._num_dp_groups:
            raise ProtocolViolation(
                f"epoch {plan.epoch}, step {plan.step} was answered by (epoch, step) "
                f"{[(result.epoch, result.step) for result in results]} for {self._num_dp_groups} dp groups"
            )
        if plan.adapters:
            self._end_without_adapter(self._adapters.returned(plan.adapters, results[0].adapters))
        if self._experts is not None:
            self._experts.returned(plan, results[0])
        for scheduler, result in zip(self._schedulers, results, strict=True):
            outputs = scheduler.update(result)
            self._outputs.take(outputs)
            for output in outputs.others:
                if output.finish_reason is not None:
                    state = self._states.pop(output.request_id)
                    self._outputs.ended.append((output, state.timeline.end()))

    def _end_without_adapter(self, slots: set[int]) -> None:
        """Only after a reset can requests have an adapter that cannot be loaded (again)."""
        for state in [state for state in self._states.values() if state.adapter in slots]:
            self._withdraw(state)
            self._end_with_error(state, "the request's adapter could not be loaded again")

    @property
    def expert_placements(self) -> list[LayerExperts]:
        """Where the next epoch's ranks are to have their experts (InitCache), where that is not in order."""
        return [] if self._experts is None else self._experts.placements()

    def load_adapter(self, name: str, path: str) -> "Future[AdapterInfo]":
        """Has every rank load the LoRA adapter in a directory of its host; later steps do it. ``name``: for requests.

        The future raises AdapterError where a rank could not; then none holds it. What is asked for again meanwhile is
        loaded once. Raises AdapterError at once where the name is taken or there is no room.
        """
        return self._adapters.load(name, path)

    def unload_adapter(self, name: str) -> "Future[None]":
        """No request can name it from now on; its memory is freed, and the future ends, when the last that has it has
        ended. Raises AdapterError where there is none."""
        return self._adapters.unload(name)

    @property
    def adapters(self) -> tuple[AdapterInfo, ...]:
        """Those that requests can name."""
        return self._adapters.loaded

    def add(self, request: Request) -> None:
        """Queues a request; its outputs come from later steps and end with exactly one finish reason.

        Raises InvalidRequest, ContextLengthExceeded or Overloaded, and then has done nothing.
        """
        self._validate(request)
        adapter = self._adapters.slot_of(request.adapter)
        state = RequestState.of(request, self._num_arrivals, adapter=adapter, clock=self._clock)
        adapter_identity = self._adapters.identity_of(request.adapter)
        state.root_hash = root_hash(self._model_identity, adapter_identity, request.cache_salt)
        state.dp_group = self._choose_group(state)
        scheduler = self._schedulers[state.dp_group]
        if not scheduler.fits(state):
            raise ContextLengthExceeded(
                f"prompt ({request.num_prompt_tokens} tokens) and max_tokens ({request.sampling.max_tokens}) need more "
                f"than the {scheduler.num_blocks} KV blocks that there are; shorten one of them",
                "max_tokens",
            )
        if (num_waiting := self._num_waiting) >= self._config.max_num_waiting:
            raise Overloaded(f"{num_waiting} requests are waiting, at most {self._config.max_num_waiting} may")
        self._num_arrivals += 1
        self._states[request.request_id] = state
        if not self.trials.holds(state):
            scheduler.add(state)

    def _choose_group(self, state: RequestState) -> int:
        if self._num_dp_groups == 1:
            return 0
        loads = [scheduler.num_running + scheduler.num_waiting for scheduler in self._schedulers]
        shares = [scheduler.num_cached(state) / len(state.token_ids) for scheduler in self._schedulers]
        return choose_group(loads, shares, self._config.max_num_seqs)

    def _validate(self, request: Request) -> None:
        sampling, num_prompt_tokens = request.sampling, request.num_prompt_tokens
        sampling.validate(self._vocab_size)
        request.tenant.validate()
        if request.request_id in self._states:
            raise InvalidRequest(f"request id {request.request_id!r} is in use", "request_id")
        if not 0 < num_prompt_tokens <= len(request.token_ids):
            raise InvalidRequest(
                f"the prompt must be at least 1 token and not more than the {len(request.token_ids)} given, "
                f"not {num_prompt_tokens}",
                "prompt",
            )
        if not 0 <= min(request.token_ids) <= max(request.token_ids) < self._vocab_size:
            raise InvalidRequest(f"token ids of this model are 0 to {self._vocab_size - 1}", "prompt")
        if num_prompt_tokens + sampling.max_tokens > self._config.max_model_len:
            raise ContextLengthExceeded(
                f"prompt ({num_prompt_tokens} tokens) and max_tokens ({sampling.max_tokens}) are together longer than "
                f"the {self._config.max_model_len} tokens that this model is served with; shorten one of them",
                "max_tokens",
            )
        if len(request.token_ids) >= num_prompt_tokens + max(sampling.max_tokens, 1):
            raise InvalidRequest(f"max_tokens ({sampling.max_tokens}) tokens are generated already", "max_tokens")

    def abort(self, request_id: str) -> bool:
        """Ends a request; the next step's outputs say so. False: no such request (it may just have ended)."""
        state = self._states.pop(request_id, None)
        if state is None:
            return False
        self._withdraw(state)
        self._outputs.end(Output(request_id, [], FinishReason.ABORT), state.timeline)
        return True

    def _withdraw(self, state: RequestState) -> None:
        if not self.trials.drop(state):
            self._schedulers[state.dp_group].abort(state)

    def reset(self, epoch: int, *, executor: Executor | None = None, cache_config: CacheConfig | None = None) -> None:
        """The gang has re-formed: plans in flight are forgotten, every request waits again with the tokens it has, and
        adapters are loaded again. A request whose adapter cannot be ends with ERROR, as does one that breaks the gang
        whenever it is computed (engine.scheduler.break_trials).

        ``cache_config``: where the new gang's cache has another size. A request that no longer fits ends with ERROR.
        """
        assert epoch > self._epoch, f"epoch {epoch} does not follow {self._epoch}"
        self._num_steps_before += self._next_step
        self._num_preemptions_before += sum(scheduler.num_preemptions for scheduler in self._schedulers)
        computed = [state for scheduler in self._schedulers for state in scheduler.in_flight()]
        if self._in_flight and (culprit := self.trials.broke(computed)) is not None:
            self._end_with_error(
                culprit,
                f"the gang broke {culprit.num_breaks} times in a row when it computed this request, which is ended so "
                "that it does not break it again",
            )
            for state in self.trials.choices_beside(culprit, list(self._states.values())):
                self._end_with_error(state, f"its other choice {culprit.request_id} broke the gang again and again")
        self._begin_epoch(epoch, executor or self._executor, cache_config or self._cache_config)
        for state in list(self._states.values()):
            state.restart()
            scheduler = self._schedulers[state.dp_group]
            if not scheduler.fits(state):
                self._end_with_error(
                    state, f"the cache has shrunk to {scheduler.num_blocks} KV blocks, too few for this request"
                )
        for state in self.trials.begin(self._states.values()):
            self._schedulers[state.dp_group].add(state)
        self._adapters.restart(self._used_adapters())
        if self._experts is not None:
            self._experts.restart()

    def _end_with_error(self, state: RequestState, message: str) -> None:
        del self._states[state.request_id]
        self._outputs.end(Output(state.request_id, [], FinishReason.ERROR, error=message), state.timeline)

    def _begin_epoch(self, epoch: int, executor: Executor, cache_config: CacheConfig) -> None:
        self._epoch = epoch
        self._executor = executor
        self._cache_config = cache_config
        self._next_step = 0
        self._draft = None
        self._broken = False
        self._in_flight: deque[tuple[StepPlan, PendingResults]] = deque()
        self._schedulers = [
            Scheduler(self._config, cache_config, self._kv_groups, input_references=self._input_references)
            for _ in range(self._num_dp_groups)
        ]

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has anything to do or to hand out."""
        return bool(self._states or self._in_flight or self._outputs or self._adapters.has_work)

    @property
    def _num_waiting(self) -> int:
        return sum(scheduler.num_waiting for scheduler in self._schedulers) + self.trials.num_held

    def stats(self) -> EngineStats:
        schedulers = self._schedulers
        return EngineStats(
            num_running=sum(scheduler.num_running for scheduler in schedulers),
            num_waiting=self._num_waiting,
            num_in_flight=len(self._in_flight),
            num_blocks=sum(scheduler.num_blocks for scheduler in schedulers),
            num_blocks_used=sum(scheduler.num_blocks_used for scheduler in schedulers),
            num_steps=self._num_steps_before + self._next_step,
            num_preemptions=self._num_preemptions_before + sum(scheduler.num_preemptions for scheduler in schedulers),
            experts=None if self._experts is None else self._experts.stats(),
        )

    def check_integrity(self) -> None:
        """Asserts what must hold between two calls (tests call it after each)."""
        self._adapters.check_integrity()
        for scheduler in self._schedulers:
            scheduler.check_integrity()
        num_held = sum(scheduler.num_running for scheduler in self._schedulers) + self._num_waiting
        assert num_held == len(self._states), f"{num_held} requests are scheduled and {len(self._states)} are live"
