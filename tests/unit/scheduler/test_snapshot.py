"""What is noted of schedulers: what was shared is shared again, what cannot be noted is refused by whoever reads it.

tests/simulate/test_replay.py has whole schedulers go on from it.
"""

from collections import deque

import msgspec
import pytest

from engine.request import Request, SamplingParams
from engine.scheduler.block_pool import BlockPool
from engine.scheduler.request_state import RequestState
from engine.scheduler.snapshot import Snapshot, Unreadable, freeze, thaw

BLOCK_SIZE = 2
REQUEST = Request("a", [1, 2, 3], 3, SamplingParams(max_tokens=9, logit_bias={4: 1.0}))


def through_json(snapshot: Snapshot) -> Snapshot:
    return msgspec.json.decode(msgspec.json.encode(snapshot), type=Snapshot)


def test_a_request_is_put_together_from_its_request_and_what_it_has_got() -> None:
    state = RequestState.of(REQUEST, arrival=7)
    state.token_ids += [8, 9]
    state.slot, state.block_tables, state.block_hashes = 3, [[5, 6]], [b"x" * 16]
    snapshot = freeze({"first": [state], "second": deque([(state, 1)])})
    state.token_ids.append(10)  # is not in it any more
    state.block_tables[0].append(7)
    assert snapshot.arrivals == [7]
    roots = thaw(through_json(snapshot), {7: REQUEST}, {}, BLOCK_SIZE)
    (again,), ((same, one),) = roots["first"], roots["second"]
    assert again is same and one == 1
    assert (again.token_ids, again.slot, again.block_tables) == ([1, 2, 3, 8, 9], 3, [[5, 6]])
    assert again.sampling == REQUEST.sampling and len(again.block_hashes) == 1


def test_a_pool_keeps_its_order_and_its_contents() -> None:
    pool = BlockPool(8)
    held = pool.allocate(4)
    for number, block in enumerate(held):
        pool.keep(block, (0, bytes([number]) * 16))
    pool.release(held[:2], -1)
    pool.release(held[2:], 5)
    again = BlockPool(8)
    thaw(through_json(freeze({"pool": pool})), {}, {"pool": again}, BLOCK_SIZE)
    again.check_integrity([])
    assert again.find((0, b"\x01" * 16)) == held[1] and again.num_deferred == 2
    for each in (pool, again):
        for step in range(6):
            each.step_returned(step)
    assert again.allocate(7) == pool.allocate(7)


def test_what_cannot_be_noted_is_named() -> None:
    snapshot = through_json(freeze({"strange": [object()]}))
    with pytest.raises(Unreadable, match="object cannot be noted"):
        thaw(snapshot, {}, {}, BLOCK_SIZE)
