"""What an engine notes of each request: when it waited, began, answered and ended, and how seldom it asks the clock."""

import pytest

from cluster.simulate.gang import SimulatedGang
from engine.config import CacheConfig, KvGroupConfig, SchedulerConfig
from engine.engine import Engine
from engine.executor.rank_times import RankTimes
from engine.messages import StepResult
from engine.request import FinishReason, Request, SamplingParams
from engine.timeline import MAX_EVENTS, Moment, Timeline, Waits, no_clock

GROUPS = (KvGroupConfig((0,)),)


class Bed:
    """An engine whose clock is the number of its calls of ``step``."""

    def __init__(self, depth: int = 1, num_blocks: int = 100, max_num_seqs: int = 4) -> None:
        self.num_asked = self.now = 0
        self.waits: dict[str, Waits] = {}
        self.ended: dict[str, tuple[FinishReason, Timeline]] = {}
        self.engine = Engine(
            executor=self.gang(0, depth, num_blocks, max_num_seqs),
            kv_groups=GROUPS,
            vocab_size=50,
            scheduler_config=SchedulerConfig(max_num_seqs, 16, 200, 8, depth),
            cache_config=CacheConfig(block_size=4, num_blocks=num_blocks),
            clock=self.clock,
        )

    def gang(self, epoch: int, depth: int = 1, num_blocks: int = 100, max_num_seqs: int = 4) -> SimulatedGang:
        return SimulatedGang(
            num_slots=max_num_seqs,
            kv_groups=GROUPS,
            block_size=4,
            num_blocks=num_blocks,
            vocab_size=50,
            depth=depth,
            epoch=epoch,
        )

    def clock(self) -> Moment:
        self.num_asked += 1
        return Moment(float(self.now))

    def add(self, name: str, num_prompt_tokens: int = 5, max_tokens: int = 6) -> None:
        self.engine.add(Request(name, [*range(num_prompt_tokens)], num_prompt_tokens, SamplingParams(max_tokens)))

    def run(self, num_steps: int = 1000) -> None:
        for _ in range(num_steps):
            if not self.engine.has_work:
                return
            self.now += 1
            outputs = self.engine.step()
            for request_id, waits in outputs.begun:
                assert request_id not in self.waits, "a request begins once"
                self.waits[request_id] = waits
            for output, timeline in outputs.ended:
                assert output.finish_reason is not None and output.request_id not in self.ended
                self.ended[output.request_id] = output.finish_reason, timeline


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_one_that_finds_no_slot_waits_until_another_ends(depth: int) -> None:
    bed = Bed(depth, max_num_seqs=1)
    bed.add("first", num_prompt_tokens=40)
    bed.add("second")
    bed.run()
    # 40 tokens are three chunks of at most 16; then a token a step.
    assert bed.waits["first"].queue_s <= 1 and bed.waits["first"].prefill_s == pytest.approx(2, abs=1)
    _, first = bed.ended["first"]
    _, second = bed.ended["second"]
    assert first.ended is not None and second.begun is not None
    assert bed.waits["second"].queue_s == second.begun.at_s >= first.ended.at_s - 1 >= 7
    for _, timeline in bed.ended.values():
        assert timeline.begun and timeline.answered and timeline.ended and not timeline.events
        assert timeline.arrived <= timeline.begun <= timeline.answered <= timeline.ended


@pytest.mark.parametrize("depth", [1, 3])
def test_the_clock_is_asked_as_often_however_many_tokens_there_are(depth: int) -> None:
    bed = Bed(depth)
    for number in range(3):
        bed.add(str(number), num_prompt_tokens=50, max_tokens=2 + 40 * number)
    bed.run()
    assert len(bed.ended) == 3 and bed.num_asked == 4 * 3


def test_who_makes_way_or_survives_a_formation_has_it_on_record() -> None:
    bed = Bed(num_blocks=13)
    for name in "ab":
        bed.add(name, num_prompt_tokens=20, max_tokens=20)
    bed.run(12)
    bed.engine.reset(1, executor=bed.gang(1, num_blocks=13))
    bed.run()
    events = {name: [what for _, what in timeline.events] for name, (_, timeline) in bed.ended.items()}
    assert all("the gang formed anew" in each for each in events.values())
    assert "preempted" in [*events["a"], *events["b"]]
    assert bed.ended.keys() == bed.waits.keys() == {"a", "b"}


def test_one_that_is_aborted_in_the_queue_never_began() -> None:
    bed = Bed(max_num_seqs=1)
    bed.add("runs")
    bed.add("waits")
    bed.run(2)
    bed.engine.abort("waits")
    bed.run()
    reason, timeline = bed.ended["waits"]
    assert reason is FinishReason.ABORT and timeline.begun is None and timeline.ended is not None
    assert "waits" not in bed.waits


def test_events_are_bounded() -> None:
    timeline = Timeline(no_clock)
    for _ in range(2 * MAX_EVENTS):
        timeline.note("preempted")
    assert len(timeline.events) == MAX_EVENTS


def test_ranks_times_add_up() -> None:
    times = RankTimes(2)
    before = times.moment()
    for step in range(3):
        times.answered({1: StepResult(0, step, 1, duration_us=7), 0: StepResult(0, step, 0, duration_us=5)})
    after = times.moment()
    assert (before.num_steps, before.rank_busy_us) == (0, (0, 0))
    assert (after.num_steps, after.rank_busy_us) == (3, (15, 21)) and after.at_s >= before.at_s
