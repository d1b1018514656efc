"""Drives one scheduler by hand."""

from collections.abc import Sequence

from engine.config import CacheConfig, KvGroupConfig, SchedulerConfig
from engine.messages import BatchPlan, PromptLogprobs, SampledToken, SlotError, StepResult
from engine.request import NO_TENANT, Output, Request, SamplingParams, Tenant
from engine.scheduler.request_state import RequestState
from engine.scheduler.scheduler import Scheduler

FULL = (KvGroupConfig((0,)),)


class Bed:
    """A scheduler with 2 tokens a block, and the shortest way to drive it."""

    def __init__(
        self,
        *,
        num_blocks: int = 100,
        max_num_seqs: int = 4,
        budget: int = 64,
        kv_groups: Sequence[KvGroupConfig] = FULL,
        input_references: bool = True,
    ) -> None:
        config = SchedulerConfig(max_num_seqs, budget)
        cache = CacheConfig(block_size=2, num_blocks=num_blocks, keeps_prefixes=False)
        self.scheduler = Scheduler(config, cache, kv_groups, input_references=input_references)
        self.num_added = 0
        self.num_steps = 0

    def add(
        self,
        num_prompt_tokens: int,
        max_tokens: int = 50,
        priority: int = 0,
        tenant: Tenant = NO_TENANT,
        **sampling: object,
    ) -> RequestState:
        token_ids = list(range(100, 100 + num_prompt_tokens))
        params = SamplingParams(max_tokens, **sampling)  # type: ignore[arg-type]
        request = Request(f"r{self.num_added}", token_ids, num_prompt_tokens, params, priority, tenant=tenant)
        state = RequestState.of(request, self.num_added, dp_group=0)
        self.num_added += 1
        self.scheduler.add(state)
        return state

    def schedule(self) -> BatchPlan | None:
        batch = self.scheduler.schedule(self.num_steps)
        self.num_steps += batch is not None
        self.scheduler.check_integrity()
        return batch

    def shares(self) -> list[tuple[int, int, int]]:
        """(Slot, start, tokens) of the next plan."""
        batch = self.schedule()
        assert batch is not None
        return [(share.slot, share.start, share.num_tokens) for share in batch.scheduled]

    def update(
        self,
        step: int,
        tokens: dict[int, int] | None = None,
        errors: Sequence[SlotError] = (),
        prompt_logprobs: Sequence[PromptLogprobs] = (),
    ) -> list[Output]:
        sampled = [SampledToken(slot, token) for slot, token in (tokens or {}).items()]
        outputs = self.scheduler.update(StepResult(0, step, 0, sampled, list(prompt_logprobs), list(errors)))
        self.scheduler.check_integrity()
        return list(outputs)
