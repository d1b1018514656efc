"""What requests share of each other's beginnings, each in the smallest case that shows it."""

import os
import subprocess
import sys
from collections.abc import Sequence

import pytest

from engine.block_hash import block_hash, extend_hashes, root_hash
from engine.config import CacheConfig, KvGroupConfig, SchedulerConfig
from engine.engine import Engine
from engine.executor.null import NullExecutor
from engine.messages import NULL_BLOCK, BatchPlan, NewRequest, SampledToken, SlotError, StepResult
from engine.request import Request, SamplingParams
from engine.scheduler.block_pool import BlockPool
from engine.scheduler.request_state import RequestState
from engine.scheduler.scheduler import Scheduler

FULL = KvGroupConfig((0,))
BLOCK_SIZE = 2


class Bed:
    """A scheduler whose requests are computed at once and each end with one token."""

    def __init__(
        self,
        kv_groups: Sequence[KvGroupConfig] = (FULL,),
        num_blocks: int = 100,
        keeps: bool = True,
        max_num_batched_tokens: int = 64,
    ) -> None:
        config = SchedulerConfig(min(4, max_num_batched_tokens), max_num_batched_tokens)
        self.scheduler = Scheduler(config, CacheConfig(BLOCK_SIZE, num_blocks, keeps), kv_groups)
        self.num_steps = 0
        self.num_added = 0

    def add(self, token_ids: Sequence[int], max_tokens: int = 1, root: bytes = b"", **sampling: int) -> RequestState:
        params = SamplingParams(max_tokens, **sampling)  # type: ignore[arg-type]
        request = Request(f"r{self.num_added}", list(token_ids), len(token_ids), params)
        state = RequestState.of(request, self.num_added, 0)
        state.root_hash = root
        self.num_added += 1
        self.scheduler.add(state)
        return state

    def schedule(self) -> BatchPlan:
        batch = self.scheduler.schedule(self.num_steps)
        assert batch is not None
        self.num_steps += 1
        self.scheduler.check_integrity()
        return batch

    def answer(self, batch: BatchPlan, *, fails: bool = False) -> None:
        slots = batch.sampling_slots
        sampled = [] if fails else [SampledToken(slot, 7) for slot in slots]
        errors = [SlotError(slot, "not a number") for slot in slots] if fails else []
        self.scheduler.update(StepResult(0, self.num_steps - 1, 0, sampled, [], errors))
        self.scheduler.check_integrity()

    def run(self, token_ids: Sequence[int], max_tokens: int = 1, root: bytes = b"", **sampling: int) -> NewRequest:
        """One request from its arrival to its end; how it was introduced to the ranks."""
        self.add(token_ids, max_tokens, root, **sampling)
        first = self.schedule()
        self.answer(first)
        while self.scheduler.num_running:
            self.answer(self.schedule())
        return first.new[0]

    def num_held(self, token_ids: Sequence[int]) -> int:
        """Leading blocks of these tokens whose content is known."""
        names: list[bytes] = []
        extend_hashes(names, b"", token_ids, len(token_ids) // BLOCK_SIZE, BLOCK_SIZE)
        found = [self.scheduler._pool.find((0, name)) is not None for name in names]
        return [*found, False].index(False)


def test_the_second_shares_whole_blocks_and_computes_at_least_one_token() -> None:
    bed = Bed()
    assert bed.run(range(6)).block_ids == []
    assert bed.run(range(6)).block_ids == [[1, 2]], "the last block's tokens are computed again, for their logits"
    assert bed.run(range(7)).block_ids == [[1, 2, 3]]
    assert bed.run([0, 1, 2, 9, 4, 5]).block_ids == [[1]]
    assert (bed.scheduler.num_tokens_admitted, bed.scheduler.num_tokens_cached) == (25, 12)


def test_nothing_is_shared_before_it_was_computed_nor_after_an_error() -> None:
    bed = Bed()
    bed.add(range(6))
    first = bed.schedule()
    bed.add(range(6))
    second = bed.schedule()
    assert second.new[0].block_ids == []
    bed.num_steps = 1
    bed.answer(first, fails=True)
    bed.num_steps = 2
    bed.answer(second, fails=True)
    assert bed.run(range(6)).block_ids == []


def test_running_requests_share_too_and_blocks_go_when_the_last_has_ended() -> None:
    bed = Bed()
    bed.add(range(5), max_tokens=4)
    bed.answer(bed.schedule())
    bed.add(range(5), max_tokens=4)
    batch = bed.schedule()
    assert batch.new[0].block_ids == [[1, 2]]
    assert bed.scheduler.num_blocks_used == 4, "two shared, and one each of its own"
    while bed.scheduler.num_running:
        bed.answer(batch)
        batch = bed.schedule() if bed.scheduler.num_running else batch
    assert bed.scheduler.num_blocks_used == 0


def test_what_was_generated_can_be_shared() -> None:
    bed = Bed()
    bed.add(range(3), max_tokens=4)
    while bed.scheduler.num_running or bed.scheduler.num_waiting:
        bed.answer(bed.schedule())
    # Of 0 1 2 7 7 7 7 all but the last token were computed.
    assert bed.run([0, 1, 2, 7, 7, 7, 7, 7, 7]).block_ids == [[1, 2, 3]]


def test_the_last_output_says_how_much_of_the_prompt_was_found() -> None:
    bed = Bed()
    bed.run(range(6))
    bed.add(range(6))
    batch = bed.schedule()
    sampled = [SampledToken(slot, 7) for slot in batch.sampling_slots]
    outputs = bed.scheduler.update(StepResult(0, bed.num_steps - 1, 0, sampled))
    assert [output.num_cached_tokens for output in outputs] == [4]


def test_other_roots_share_nothing() -> None:
    bed = Bed()
    for root in (root_hash(""), root_hash("adapter#1"), root_hash("adapter#2")):
        bed.add(range(6), root=root)
        batch = bed.schedule()
        assert batch.new[0].block_ids == []
        bed.answer(batch)


def test_prompt_logprobs_need_every_token_computed() -> None:
    bed = Bed()
    bed.run(range(6))
    bed.add(range(6), prompt_logprobs=0)
    assert bed.schedule().new[0].block_ids == []


def test_switched_off() -> None:
    bed = Bed(keeps=False)
    bed.run(range(6))
    assert bed.run(range(6)).block_ids == []


def test_a_chunked_group_shares_what_the_next_token_sees() -> None:
    """Chunks of 4 positions: after 8 nothing is seen of what is before, after 6 the block of positions 4 and 5."""
    bed = Bed((FULL, KvGroupConfig((1,), chunk_size=4)), max_num_batched_tokens=3)
    bed.run(range(9))
    tables = bed.run(range(9)).block_ids
    assert [len(table) for table in tables] == [4, 4]
    assert NULL_BLOCK not in tables[0] and tables[1] == [NULL_BLOCK] * 4
    tables = bed.run(range(7)).block_ids
    assert NULL_BLOCK not in tables[0] and tables[1][:2] == [NULL_BLOCK] * 2 and tables[1][2] != NULL_BLOCK


def test_a_hit_must_hold_in_all_groups() -> None:
    """A window of 4: what is behind it was given back, and is given to somebody else first."""
    bed = Bed((FULL, KvGroupConfig((1,), window_size=4)), max_num_batched_tokens=4)
    bed.run(range(12))
    pool = bed.scheduler._pool
    names: list[bytes] = []
    extend_hashes(names, b"", range(12), 6, BLOCK_SIZE)
    lost = pool.find((1, names[4]))
    assert lost is not None
    taken = []
    while pool.find((1, names[4])) is not None:
        taken += pool.allocate(1)
    pool.release(taken, -1)
    tables = bed.run(range(12)).block_ids
    assert tables == [] or len(tables[0]) < 5


def test_the_least_recently_used_go_first_and_tails_before_beginnings() -> None:
    bed = Bed(num_blocks=1 + 8)
    bed.run(range(6))  # 3 blocks
    bed.run(range(50, 56))  # 3 more
    bed.run(range(6))  # used again
    bed.run(range(80, 90))  # 5 blocks: 2 unused ones, and the tails of what was used least recently
    assert (bed.num_held(range(6)), bed.num_held(range(50, 56))) == (2, 1)


def test_a_preempted_request_finds_its_own_blocks() -> None:
    bed = Bed()
    state = bed.add(range(8), max_tokens=5)
    bed.answer(bed.schedule())
    bed.scheduler._preempt(state)
    assert [len(table) for table in bed.schedule().new[0].block_ids] == [4]


def test_names_are_the_same_in_every_process() -> None:
    """Whatever seed Python gives its own hashes, and one by one as many at once."""
    program = """
from engine.block_hash import *
names = []
extend_hashes(names, root_hash("model", "adapter#1", "tenant"), [1, 2, 70000, 4, 5, 6], 3, 2)
print(*(name.hex() for name in names))
"""
    expected, parent = [], root_hash("model", "adapter#1", "tenant")
    for token_ids in ([1, 2], [70000, 4], [5, 6]):
        parent = block_hash(parent, token_ids)
        expected.append(parent.hex())
    for hash_seed in ("0", "4711"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", program]
        found = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
        assert found.split() == expected
    assert expected[0] == "493108f0658959f9a4dbad69cbcb86de", (
        "a name is a contract between versions: other numbers, other caches"
    )
    assert root_hash("a", "b") != root_hash("ab", "") != root_hash("", "ab")


@pytest.mark.parametrize("changes", [{"model_identity": "other"}, {"cache_salt": "other"}, {}], ids=str)
def test_what_blocks_depend_on_besides_their_tokens(changes: dict[str, str]) -> None:
    """Two engines, one request each: whether the second would find the first's blocks."""
    roots = []
    for given in ({"model_identity": "model", "cache_salt": "tenant"}, changes):
        values = {"model_identity": "model", "cache_salt": "tenant"} | given
        engine = Engine(
            executor=NullExecutor(1),
            kv_groups=(FULL,),
            vocab_size=100,
            scheduler_config=SchedulerConfig(),
            cache_config=CacheConfig(BLOCK_SIZE, 100),
            model_identity=values["model_identity"],
        )
        engine.add(Request("r", [1, 2, 3], 3, SamplingParams(4), cache_salt=values["cache_salt"]))
        roots.append(engine._states["r"].root_hash)
    assert (roots[0] == roots[1]) == (not changes)


def test_equal_contents_computed_twice_are_kept_once() -> None:
    pool = BlockPool(4)
    first, second = pool.allocate(2)
    pool.keep(first, (0, b"x"))
    pool.keep(second, (0, b"x"))
    assert pool.find((0, b"x")) == first
    pool.release([first, second], -1)
    pool.check_integrity([])
    pool.share([first])
    pool.check_integrity([first])
