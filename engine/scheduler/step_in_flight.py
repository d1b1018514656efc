"""What the leader remembers of a plan until its result returns, and what it demands of that result."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from engine.errors import ProtocolViolation
from engine.messages import BatchPlan, StepResult
from engine.outputs import Outputs
from engine.packed import pack, unpack
from engine.request import TopLogprobs
from engine.scheduler.latency_budget import TokenBudget
from engine.scheduler.prompt_costs import PromptShare
from engine.scheduler.request_state import RequestState

PromptEntries = dict[int, list[TopLogprobs | None]]
"""By slot: log-probabilities of prompt tokens."""


@dataclass(slots=True)
class StepInFlight:
    """Who had which slot when a plan was made; slots may have changed hands when its result returns."""

    step: int
    sampling: dict[int, RequestState] = field(default_factory=dict)
    """Slot to request, where a next token is expected."""
    embedding: dict[int, RequestState] = field(default_factory=dict)
    """Slot to request, where an embedding is expected."""
    prefilling: dict[int, RequestState] = field(default_factory=dict)
    """Slot to request, where a prompt has more chunks to come."""
    filled: list[tuple[RequestState, int, int]] = field(default_factory=list)
    """(Request, slot, positions computed when the step is over) where that may fill a block."""
    may_end: bool = False
    """Whether some request gets its last token or its embedding, or has ended since."""
    num_decodes: int = 0
    """Requests with one token in this step."""
    prompts: list[PromptShare] = field(default_factory=list)
    """What the others compute."""
    prompts_ending: list[tuple[int, RequestState]] = field(default_factory=list)
    """(Slot, request) whose prompt's log-probabilities must be complete with this step."""
    answering: list[tuple[int, RequestState]] = field(default_factory=list)
    """(Slot, request) whose prompt is computed with this step."""

    def drop(self, slots: set[int]) -> None:
        """The plan, which has not left yet, does not name them."""
        for slot in slots:
            for share in (self.sampling, self.embedding, self.prefilling):
                share.pop(slot, None)
        self.filled = [entry for entry in self.filled if entry[1] not in slots]
        self.prompts_ending = [entry for entry in self.prompts_ending if entry[0] not in slots]
        self.answering = [entry for entry in self.answering if entry[0] not in slots]

    def begin_outputs(self) -> Outputs:
        """With nothing in them but how long those have waited that get their first token."""
        outputs = Outputs()
        for _, state in self.answering:
            if not state.finished and (waits := state.timeline.answer()) is not None:
                outputs.begun.append((state.request_id, waits))
        return outputs

    def check_slots(self, result: StepResult) -> None:
        """Raises ProtocolViolation unless every slot to be sampled has one token or error, every one to be embedded one
        embedding or error, and no other has any."""
        assert self.step == result.step, f"result of step {result.step} where {self.step} is the oldest in flight"
        has_as_many = len(result.slots) == len(result.token_ids)
        is_plain = has_as_many and not (result.errors or result.sampled or result.pooled or self.embedding)
        if is_plain and result.slots == pack(self.sampling):
            return  # as ranks answer: in the plan's order
        failed = [error.slot for error in result.errors]
        known = {*self.sampling, *self.embedding, *self.prefilling}
        if len(failed) > len({*failed}) or not known.issuperset(failed):
            raise ProtocolViolation(f"step {self.step}: errors of slots {sorted(failed)} where {sorted(known)} ran")
        _check_answered(self.step, "tokens", [each.slot for each in result.all_sampled], failed, self.sampling)
        _check_answered(self.step, "embeddings", [each.slot for each in result.pooled], failed, self.embedding)

    def take_tokens(self, token_ids: Sequence[int], outputs: Outputs) -> None:
        """One for each request to be sampled, and that is all there is to it."""
        outputs.token_ids += token_ids
        for state, token_id in zip(self.sampling.values(), token_ids, strict=True):
            state.token_ids.append(token_id)
            state.num_pending -= 1
            outputs.request_ids.append(state.request_id)

    def take_failed(self, slot: int) -> RequestState:
        """Nothing else is expected of it in this step."""
        share = next(share for share in (self.sampling, self.embedding, self.prefilling) if slot in share)
        return share.pop(slot)

    def new_prompt_logprobs(self, result: StepResult) -> PromptEntries:
        """By slot, what was not sent before. Position 0 has None, for nothing predicts it.

        Raises ProtocolViolation where some are missing.
        """
        new: PromptEntries = {}
        for entry in result.prompt_logprobs:
            state = self.sampling.get(entry.slot) or self.prefilling.get(entry.slot)
            if state is None or entry.start < 1 or entry.slot in new:
                raise ProtocolViolation(f"step {self.step}: unexpected log-probabilities of slot {entry.slot}")
            is_first = entry.start == 1
            logprobs: list[TopLogprobs | None] = [None, *entry.logprobs] if is_first else list(entry.logprobs)
            num_known = state.num_prompt_logprobs - (0 if is_first else entry.start)
            if num_known < 0 and not state.finished:
                raise ProtocolViolation(
                    f"step {self.step}, request {state.request_id}: log-probabilities from position {entry.start}, "
                    f"but only {state.num_prompt_logprobs} came before"
                )
            if num_known < len(logprobs):
                new[entry.slot] = logprobs[num_known:]
        if self.prompts_ending:
            self._complete(new, {error.slot for error in result.errors})
        return new

    def _complete(self, new: PromptEntries, failed: set[int]) -> None:
        for slot, state in self.prompts_ending:
            if state.num_prompt_tokens == 1 and state.num_prompt_logprobs == 0:
                new[slot] = [None]
            num_missing = state.num_prompt_tokens - state.num_prompt_logprobs - len(new.get(slot, ()))
            if num_missing and not state.finished and slot not in failed:
                raise ProtocolViolation(
                    f"step {self.step}, request {state.request_id}: {num_missing} of the prompt's log-probabilities "
                    "are missing"
                )


def _check_answered(
    step: int, what: str, slots: list[int], failed: list[int], expected: dict[int, RequestState]
) -> None:
    answered = sorted(slots + [slot for slot in failed if slot in expected])
    if answered != sorted(expected):
        raise ProtocolViolation(
            f"step {step}: {what} or errors of slots {answered} where slots {sorted(expected)} were due"
        )


@dataclass(slots=True)
class Draft:
    """A batch that was begun before its plan could leave. ``budget``: what running requests leave to waiting ones."""

    batch: BatchPlan
    flight: StepInFlight
    budget: TokenBudget
    short_of_blocks: bool
    """Some running request had to go without: nobody is admitted."""

    def without(self, removed: list[int]) -> BatchPlan:
        """The batch without the requests that have left these slots since it was begun."""
        ended = set(removed)
        self.flight.drop(ended)
        scheduled = [share for share in self.batch.scheduled if share.slot not in ended]
        decodes = pack([slot for slot in unpack(self.batch.decodes) if slot not in ended])
        return BatchPlan(self.batch.removed + removed, [], scheduled, decodes=decodes)


def requests_of(flights: Iterable[StepInFlight]) -> list[RequestState]:
    """Those that these plans compute, each once; some may have ended meanwhile."""
    shares = [share for flight in flights for share in (flight.sampling, flight.embedding, flight.prefilling)]
    return list({id(state): state for share in shares for state in share.values()}.values())
