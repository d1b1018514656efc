"""What the leader knows of a live request."""

from dataclasses import dataclass, field

from engine.messages import NO_ADAPTER, NO_STEP, NewRequest
from engine.request import NO_TENANT, Request, SamplingParams, Tenant
from engine.scheduler.account import Account
from engine.timeline import Clock, Timeline, no_clock

NO_SLOT = -1


@dataclass(slots=True, eq=False)
class RequestState:
    """A live request: waiting (no slot, no blocks) or running (both).

    ``token_ids``: prompt and all generated tokens whose values are known here. ``num_pending`` more were scheduled to
    be sampled by plans still in flight. ``num_computed``: positions whose keys and values some plan computes, plans in
    flight included. If anything is pending, all but the last pending token has been scheduled.
    """

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    priority: int
    arrival: int
    """Counts requests in order of ``add``; never changes, so a preempted request goes before all later ones."""
    max_num_tokens: int
    """Prompt and ``max_tokens`` together. An embedding takes the place of one token."""
    dp_group: int = 0
    adapter: int = NO_ADAPTER
    """The slot of its LoRA adapter, from its arrival to its end."""
    tenant: Tenant = NO_TENANT
    account: Account = field(default_factory=Account)
    """What its tenant has been served, while the scheduler knows it."""
    num_given_tokens: int = 0
    """Of ``token_ids``, those that it came with: the prompt, and what was generated elsewhere."""
    num_charged_prompt: int = 0
    num_charged_outputs: int = 0
    """Leading positions of the former, and tokens after them, that its tenant was charged for."""
    is_queued: bool = False
    """It is in the waiting queue."""

    timeline: Timeline = field(default_factory=lambda: Timeline(no_clock))

    slot: int = NO_SLOT
    num_computed: int = 0
    num_pending: int = 0
    num_sent: int = 0
    """Leading tokens that the ranks know, by value or because they sampled them."""
    entry_step: int = NO_STEP
    """The plan in which it got its slot."""
    sample_step: int = NO_STEP
    """The last plan that samples for this request."""
    last_step: int = NO_STEP
    """The last plan that names this request."""
    block_tables: list[list[int]] = field(default_factory=list)
    """One per KV group, all equally long; NULL_BLOCK where a chunked or sliding group gave a block back."""
    num_unseen_blocks: list[int] = field(default_factory=list)
    """Per KV group: leading blocks that were given back."""
    num_block_tokens: int = 0
    """Positions that the block tables reach."""
    unseen_at: int = 0
    """The next position whose scheduling lets a chunked or sliding group give blocks back."""
    root_hash: bytes = b""
    """Where the names of its blocks begin (engine.block_hash)."""
    look_again_at: int = NO_STEP
    """While it waits for blocks: the first plan that may admit it."""
    block_hashes: list[bytes] = field(default_factory=list)
    """Names of its leading full blocks, as far as they were needed."""
    num_kept_tokens: int = 0
    """Leading positions whose blocks others may share."""
    num_cached_tokens: int = 0
    """Positions of the prompt that it did not have to compute when it began, because others had."""
    num_prompt_logprobs: int = 0
    """Prompt positions whose log-probabilities went out already, all of them where none were asked for. Preemption
    does not send them again."""
    has_begun: bool = False
    """An output, maybe an empty one, went out."""
    finished: bool = False
    num_breaks: int = 0
    """How often the gang broke while it computed this, with no new token in between (engine.scheduler.break_trials)."""
    num_tokens_at_break: int = 0
    """Of ``token_ids``, at the last of these."""
    lockstep_end: int = NO_STEP
    """While it is in lockstep (engine.scheduler.lockstep): after how many plans it leaves."""

    @classmethod
    def of(
        cls,
        request: Request,
        arrival: int,
        dp_group: int = 0,
        adapter: int = NO_ADAPTER,
        clock: Clock = no_clock,
    ) -> "RequestState":
        return cls(
            request_id=request.request_id,
            token_ids=list(request.token_ids),
            num_prompt_tokens=request.num_prompt_tokens,
            sampling=request.sampling,
            priority=request.priority,
            arrival=arrival,
            max_num_tokens=request.num_prompt_tokens + max(request.sampling.max_tokens, 1),
            dp_group=dp_group,
            adapter=adapter,
            tenant=request.tenant,
            timeline=Timeline(clock, request.trace),
            num_given_tokens=len(request.token_ids),
            num_prompt_logprobs=request.num_prompt_tokens if request.sampling.prompt_logprobs is None else 0,
        )

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    def as_new(self, prefix: list[list[int]]) -> NewRequest:
        """As a plan has it whose ranks do not know it. ``prefix``: blocks of each group that hold its beginning."""
        return NewRequest(
            self.slot,
            self.token_ids.copy(),
            self.num_prompt_tokens,
            self.sampling,
            self.adapter,
            [table.copy() for table in prefix] if self.num_computed else [],
        )

    def restart(self) -> None:
        """A new epoch: the ranks and the cache know nothing of this request; its known tokens stay."""
        self.timeline.note("the gang formed anew")
        self.slot = NO_SLOT
        self.is_queued = False
        self.num_computed = self.num_pending = self.num_sent = 0
        self.sample_step = self.last_step = self.look_again_at = NO_STEP
        self.block_tables = []
        self.num_unseen_blocks = []
        self.num_block_tokens = self.num_kept_tokens = 0
        self.lockstep_end = NO_STEP
