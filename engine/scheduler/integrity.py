"""What must hold of a scheduler's requests between any two calls."""

from collections.abc import Sequence

from engine.messages import NO_STEP
from engine.scheduler.request_state import NO_SLOT, RequestState


def check_requests(running: Sequence[RequestState], waiting: Sequence[RequestState]) -> None:
    """Raises AssertionError."""
    for state in [*running, *waiting]:
        assert not state.finished, f"request {state.request_id} ended and is still held"
        assert len(state.token_ids) + state.num_pending <= state.max_num_tokens, "tokens beyond max_tokens"
    for state in waiting:
        assert state.slot == NO_SLOT and not state.block_tables, "waiting with blocks"
        assert state.lockstep_end == NO_STEP, "waiting in lockstep"


def held_blocks(running: Sequence[RequestState]) -> list[int]:
    """The ids in all block tables, once for each that names them."""
    return [
        block_id
        for state in running
        for table, num_unseen in zip(state.block_tables, state.num_unseen_blocks, strict=True)
        for block_id in table[num_unseen:]
    ]
