"""A request that kills a rank whenever it is computed is ended; what ran beside it is not."""

import pytest

from cluster.simulate.gang import SimulatedGang, sequential_tokens
from engine.config import CacheConfig, KvGroupConfig, SchedulerConfig
from engine.engine import Engine
from engine.errors import RankFailure
from engine.request import FinishReason, Output, Request, SamplingParams

VOCAB_SIZE = 50
GROUPS = (KvGroupConfig((0,)), KvGroupConfig((1,), chunk_size=8))
NUM_PROMPT_TOKENS = 10
MAX_TOKENS = 8


def prompt(seed: int) -> list[int]:
    """No two share a block."""
    return list(range(seed, seed + NUM_PROMPT_TOKENS))


class Bed:
    """An engine whose gang is formed anew after each break.

    Args:
        dies_at: (seed, position) pairs that kill a rank.
    """

    def __init__(self, dies_at: set[tuple[int, int]], depth: int = 1, num_dp_groups: int = 1) -> None:
        self._dies_at = dies_at
        self._depth = depth
        self._num_dp_groups = num_dp_groups
        self.num_breaks = 0
        self.gang = self._new_gang()
        self.engine = Engine(
            executor=self.gang,
            kv_groups=GROUPS,
            vocab_size=VOCAB_SIZE,
            scheduler_config=SchedulerConfig(4, 8, 64, 32, depth),
            cache_config=CacheConfig(block_size=4, num_blocks=100),
            num_dp_groups=num_dp_groups,
        )
        self.outputs: dict[str, list[Output]] = {}
        self.explained: list[int] = []
        self.engine.trials.on_explained = self.explained.append

    def _new_gang(self) -> SimulatedGang:
        return SimulatedGang(
            num_slots=4,
            kv_groups=GROUPS,
            block_size=4,
            num_blocks=100,
            vocab_size=VOCAB_SIZE,
            depth=self._depth,
            epoch=self.num_breaks,
            num_dp_groups=self._num_dp_groups,
            dies_at=self._dies_at,
        )

    def add(self, *seeds: int, of: int | None = None) -> None:
        """``of``: whose prompt they have; None: each its own."""
        for seed in seeds:
            self.outputs[f"r{seed}"] = []
            ids = prompt(seed if of is None else of)
            self.engine.add(Request(f"r{seed}", ids, NUM_PROMPT_TOKENS, SamplingParams(MAX_TOKENS, seed=seed)))

    def step(self) -> None:
        try:
            outputs = self.engine.step()
        except RankFailure:
            self.num_breaks += 1
            self.gang = self._new_gang()
            self.engine.reset(self.num_breaks, executor=self.gang)
            return
        self.engine.check_integrity()
        for output in outputs:
            self.outputs[output.request_id].append(output)

    def run(self) -> None:
        for _ in range(500):
            if not self.engine.has_work:
                return
            self.step()
        raise AssertionError("it does not end")

    def num_tokens(self) -> list[int]:
        return [sum(len(output.token_ids) for output in outputs) for outputs in self.outputs.values()]

    def has_its_tokens(self, seed: int) -> bool:
        outputs = self.outputs[f"r{seed}"]
        found = [token_id for output in outputs for token_id in output.token_ids]
        sampling = SamplingParams(MAX_TOKENS, seed=seed)
        expected = sequential_tokens(sampling, prompt(seed), NUM_PROMPT_TOKENS, VOCAB_SIZE)
        return found == expected and outputs[-1].finish_reason is FinishReason.LENGTH

    def error(self, seed: int) -> str:
        (last,) = [output for output in self.outputs[f"r{seed}"] if output.finish_reason is not None]
        assert last.finish_reason is FinishReason.ERROR and last.error is not None
        return last.error


POSITIONS = [pytest.param(0, id="prompt"), pytest.param(9, id="end of the prompt"), pytest.param(13, id="fourth token")]


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("depth", [1, 2])
def test_alone_it_costs_two_repairs(position: int, depth: int) -> None:
    bed = Bed({(0, position)}, depth)
    bed.add(0)
    bed.run()
    assert "broke 2 times in a row when it computed this request" in bed.error(0)
    assert bed.num_breaks == 2


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize(("depth", "num_dp_groups"), [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("culprit", [0, 3, 5])
def test_among_others_it_costs_three_and_they_go_on(
    position: int, depth: int, num_dp_groups: int, culprit: int
) -> None:
    bed = Bed({(culprit, position)}, depth, num_dp_groups)
    bed.add(*range(6))
    bed.run()
    assert "times in a row" in bed.error(culprit)
    assert all(bed.has_its_tokens(seed) for seed in range(6) if seed != culprit)
    assert bed.num_breaks <= 3
    bed.add(6)  # where nobody had a token behind the culprit, this one has
    bed.run()
    assert bed.explained == [bed.num_breaks]


def test_two_of_them() -> None:
    bed = Bed({(1, 0), (2, 12)})
    bed.add(*range(4))
    bed.run()
    assert bed.error(1) and bed.error(2)
    assert bed.has_its_tokens(0) and bed.has_its_tokens(3)
    assert bed.num_breaks <= 6


def test_accidents_end_nothing() -> None:
    """However often the gang breaks, as long as each request has a token in between."""
    bed = Bed(set())
    bed.add(*range(4))
    while bed.engine.has_work:
        before = bed.num_tokens()
        while any(now == then < MAX_TOKENS for now, then in zip(bed.num_tokens(), before, strict=True)):
            bed.step()
        bed.gang.close()
    assert bed.num_breaks > 3
    assert all(bed.has_its_tokens(seed) for seed in range(4))


def test_who_waits_for_a_trial_may_be_aborted_and_who_comes_meanwhile_waits() -> None:
    bed = Bed({(1, 9)})
    bed.add(0, 1, 2)
    while bed.num_breaks < 2:
        bed.step()
    bed.add(3)
    num_waiting = bed.engine.stats().num_waiting
    assert bed.engine.abort("r2") and bed.engine.stats().num_waiting == num_waiting - 1
    bed.engine.check_integrity()
    bed.run()
    assert bed.outputs["r2"][-1].finish_reason is FinishReason.ABORT
    assert "times in a row" in bed.error(1)
    assert bed.has_its_tokens(0) and bed.has_its_tokens(3)


def test_who_ran_beside_a_culprit_that_was_aborted_meanwhile_is_not_taken_for_it() -> None:
    bed = Bed({(0, 9)})
    bed.add(0, 1)
    while not bed.num_breaks:
        bed.step()
    bed.step()  # the first chunk of its prompt; the second, which kills, is in flight with the first of the other's
    assert bed.engine.abort("r0")
    bed.run()
    assert bed.num_breaks == 2 and bed.has_its_tokens(1)


def test_an_end_is_told_before_the_next_trial_so_that_its_siblings_can_be_stopped() -> None:
    """A client's request with four choices, of which none can be computed."""
    bed = Bed({(seed, 0) for seed in range(4)})
    bed.add(*range(4))
    while not any(bed.outputs.values()):
        bed.step()
    num_breaks = bed.num_breaks
    (ended,) = [request_id for request_id, outputs in bed.outputs.items() if outputs]
    for request_id in bed.outputs.keys() - {ended}:
        assert bed.engine.abort(request_id)
    bed.run()
    assert bed.num_breaks == num_breaks <= 3


@pytest.mark.parametrize("healthy", [0, 4])
def test_behind_each_of_several_another_has_a_token_so_that_no_gang_gives_up(healthy: int) -> None:
    """Four of the same prompt, and nobody who stops the others where one has ended. A gang gives up at its sixth
    repair."""
    deadly = [seed for seed in range(5) if seed != healthy]
    bed = Bed({(seed, 12) for seed in deadly})
    for seed in range(5):
        bed.add(seed, of=healthy if seed == healthy else deadly[0])
    num_unexplained = []
    while bed.engine.has_work:
        bed.step()
        num_unexplained.append(bed.num_breaks - sum(bed.explained))
    assert all("times in a row" in bed.error(seed) for seed in deadly) and bed.has_its_tokens(healthy)
    assert max(num_unexplained) <= 5


def test_one_that_breaks_it_a_token_later_does_not_pass_its_trial_for_that() -> None:
    """Two plans were in flight, and the second one broke the gang."""
    bed = Bed({(0, 12), (1, 12)}, depth=2)
    bed.add(0, 1, 2)
    bed.run()
    assert bed.error(0) and bed.error(1) and bed.has_its_tokens(2)


def test_a_gang_that_computes_nothing_any_more_is_not_explained_by_its_requests() -> None:
    bed = Bed({(seed, 0) for seed in range(4)})
    bed.add(*range(4))
    bed.run()
    assert all(bed.error(seed) for seed in range(4)) and bed.explained == []
    bed.add(4)
    bed.run()
    assert bed.has_its_tokens(4) and bed.explained == [bed.num_breaks]
