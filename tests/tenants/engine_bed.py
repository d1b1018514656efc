"""One dp group's scheduler on a virtual clock: steps take as long as their tokens say, and nothing is computed."""

from collections import Counter, deque
from dataclasses import dataclass, field

from engine.config import CacheConfig, KvGroupConfig, SchedulerConfig
from engine.messages import BatchPlan, SampledToken, StepResult
from engine.packed import unpack
from engine.request import Request, SamplingParams, Tenant
from engine.scheduler.request_state import RequestState
from engine.scheduler.scheduler import Scheduler

FULL = (KvGroupConfig((0,)),)
BLOCK_SIZE = 4


@dataclass
class EngineBed:
    """``depth``: plans in flight. ``seconds_per_token``: 0 leaves the steps' durations unknown to the scheduler."""

    max_num_seqs: int = 8
    budget: int = 64
    num_blocks: int = 1000
    depth: int = 1
    seconds_per_token: float = 0.0
    step: int = 0
    now_s: float = 0.0
    num_added: int = 0
    served: Counter[str] = field(default_factory=Counter)
    """Tokens by tenant: prompts' 1, generated ones' 2, as the paper counts them."""
    first_token_step: dict[str, int] = field(default_factory=dict)
    finished: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = SchedulerConfig(self.max_num_seqs, self.budget, depth=self.depth)
        cache = CacheConfig(BLOCK_SIZE, self.num_blocks, keeps_prefixes=False)
        self.scheduler = Scheduler(config, cache, FULL)
        self.in_flight: deque[tuple[int, BatchPlan]] = deque()
        self.states: dict[str, RequestState] = {}
        self.slots: dict[int, RequestState] = {}
        self.counted: Counter[str] = Counter()

    def add(self, tenant: Tenant, num_prompt_tokens: int, max_tokens: int, priority: int = 0) -> str:
        request_id = f"{tenant.name}-{self.num_added}"
        prompt = [self.num_added + position for position in range(num_prompt_tokens)]
        request = Request(request_id, prompt, num_prompt_tokens, SamplingParams(max_tokens), priority, tenant=tenant)
        state = self.states[request_id] = RequestState.of(request, self.num_added)
        self.num_added += 1
        self.scheduler.add(state)
        return request_id

    @property
    def is_busy(self) -> bool:
        return len(self.finished) < len(self.states)

    def run_step(self) -> None:
        """One step returns; as many as fit are sent."""
        while len(self.in_flight) < self.depth:
            batch = self.scheduler.schedule(self.step)
            self._check(self.step)
            if batch is None:
                break
            self.in_flight.append((self.step, batch))
            self._follow(batch)
            self.step += 1
        if self.depth > 1:
            self.scheduler.draft(self.step)
        if self.in_flight:
            self._return(*self.in_flight.popleft())

    def _follow(self, batch: BatchPlan) -> None:
        running = {state.slot: state for state in self.states.values() if state.slot >= 0}
        for share in batch.scheduled:
            state = running[share.slot]
            end = min(share.start + share.num_tokens, state.num_given_tokens)
            new = end - max(share.start, self.counted[state.request_id])
            if new > 0:
                self.counted[state.request_id] = end
                self.served[state.tenant.name] += new

    def _return(self, step: int, batch: BatchPlan) -> None:
        flight = self.scheduler._in_flight[0]
        num_tokens = sum(share.num_tokens for share in batch.scheduled) + len(unpack(batch.decodes))
        duration_s = self.seconds_per_token * (20 + num_tokens)
        self.now_s += duration_s
        sampled = [SampledToken(slot, 7) for slot in flight.sampling]
        for output in self.scheduler.update(StepResult(0, step, int(duration_s * 1e6), sampled, [], [])):
            if output.token_ids:
                self.served[self.states[output.request_id].tenant.name] += 2 * len(output.token_ids)
                self.first_token_step.setdefault(output.request_id, step)
            if output.finish_reason is not None:
                self.finished[output.request_id] = step
        self._check(step)

    def _check(self, step: int) -> None:
        """In every fourth step: it looks at each block, which takes as long as the step. The scheduler's own tests do
        so in all of theirs."""
        if step % 4 == 0:
            self.scheduler.check_integrity()

    def steps_to_first_token(self, tenant: Tenant, num_prompt_tokens: int, max_tokens: int) -> int:
        """Steps that begin after a request came, up to the one that gives its first token."""
        began = self.step
        request_id = self.add(tenant, num_prompt_tokens, max_tokens)
        for _ in range(10_000):
            if request_id in self.first_token_step:
                return self.first_token_step[request_id] - began + 1
            self.run_step()
        raise AssertionError(f"{request_id} starved")
