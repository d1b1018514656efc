"""A request's share of a plan, and what the leader notes about it."""

from engine.messages import NO_STEP, BatchPlan, ScheduledRequest
from engine.scheduler.block_tables import BlockTables
from engine.scheduler.request_state import RequestState
from engine.scheduler.step_in_flight import StepInFlight

_NO_TOKENS: list[int] = []
_NO_BLOCKS: list[list[int]] = []


def share_next(state: RequestState, batch: BatchPlan, flight: StepInFlight, tables: BlockTables) -> None:
    """As ``share``, for one token that a plan in flight samples, in a block that is there: the usual case."""
    slot, start = state.slot, state.num_computed
    batch.scheduled.append(ScheduledRequest(slot, start, 1, _NO_TOKENS, _NO_BLOCKS, True, state.sample_step))
    end = state.num_computed = state.num_sent = start + 1
    state.num_pending += 1
    state.sample_step = state.last_step = flight.step
    flight.sampling[slot] = state
    flight.num_decodes += 1
    flight.may_end |= end + 1 >= state.max_num_tokens
    if end == state.num_block_tokens:
        flight.filled.append((state, slot, end))
    if end >= state.unseen_at:
        tables.release_unseen(state, end)


def share(state: RequestState, num_tokens: int, batch: BatchPlan, flight: StepInFlight, tables: BlockTables) -> None:
    """Puts the next ``num_tokens`` of a request into the batch. The blocks for them are there."""
    start = state.num_computed
    end = start + num_tokens
    new_block_ids = tables.extend(state, end) if end > state.num_block_tokens else _NO_BLOCKS
    token_ids = _NO_TOKENS
    input_step = NO_STEP
    if end > state.num_sent:
        if state.num_pending:
            input_step = state.sample_step
        else:
            token_ids = state.token_ids[state.num_sent : end]
        state.num_sent = end
    sample = end == len(state.token_ids) + state.num_pending
    batch.scheduled.append(
        ScheduledRequest(state.slot, start, num_tokens, token_ids, new_block_ids, sample, input_step)
    )
    state.num_computed = end
    state.last_step = flight.step
    if start < state.num_given_tokens:
        state.account.charge_prompt(state, start, end)
        state.timeline.begin()
        if sample:
            flight.answering.append((state.slot, state))
    if end == state.num_block_tokens or num_tokens > 1:
        flight.filled.append((state, state.slot, end))
    if num_tokens == 1:
        flight.num_decodes += 1
    else:
        flight.prompts.append((start, num_tokens))
    if sample:
        state.num_pending += 1
        state.sample_step = flight.step
        (flight.sampling if state.sampling.pooling is None else flight.embedding)[state.slot] = state
        flight.may_end |= end + 1 >= state.max_num_tokens
        if state.num_prompt_logprobs < state.num_prompt_tokens:
            flight.prompts_ending.append((state.slot, state))
    else:
        flight.prefilling[state.slot] = state
    if end >= state.unseen_at:
        tables.release_unseen(state, end)
