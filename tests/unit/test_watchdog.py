"""Busy, stalled and dead told apart: gangs on a virtual clock, whose ranks meet in a collective after every layer."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from msgspec.structs import replace

from engine.config import ParallelConfig
from engine.executor.step_times import StepTimes
from engine.executor.watchdog import PendingPlan, RankState, Verdict, Watchdog
from engine.messages import BatchPlan, ScheduledRequest, StepPlan
from engine.packed import pack
from engine.progress import AxisSample, Operation, RankSample

LOOK_S = 0.25
NUM_LAYERS = 12
IDLE_AXIS = AxisSample()


@dataclass
class Hang:
    """What befalls a rank, and from when on."""

    rank: int
    at_s: float
    process_state: str


class SimulatedGang:
    """Tensor-parallel ranks: each computes a layer, then waits until all have. Times are seconds of virtual time."""

    def __init__(self, tp: int, hang: Hang | None = None) -> None:
        self.tp, self.hang = tp, hang
        self.cpu_s = [0.0] * tp
        self.num_collectives = 0

    def step(
        self, step: int, began_s: float, layer_s: Callable[[int, int], float]
    ) -> Iterator[tuple[float, list[RankSample], bool]]:
        """(time, samples, has ended) at every look; ``layer_s(layer, rank)``: how long a rank computes a layer."""
        ends: list[list[float]] = []  # by layer and rank: when it comes to the collective
        now_s = began_s
        for layer in range(NUM_LAYERS):
            ends.append([now_s + layer_s(layer, rank) for rank in range(self.tp)])
            for rank, end_s in enumerate(ends[-1]):
                if self.hang is not None and self.hang.rank == rank and end_s >= self.hang.at_s:
                    ends[-1][rank] = float("inf")
            now_s = max(ends[-1])
            if now_s == float("inf"):
                break
        look_s = began_s + LOOK_S
        while look_s < now_s:
            yield look_s, [self._sample(rank, step, look_s, ends) for rank in range(self.tp)], False
            look_s += LOOK_S
        self.num_collectives += NUM_LAYERS
        yield now_s, [], True

    def _sample(self, rank: int, step: int, now_s: float, ends: list[list[float]]) -> RankSample:
        layer = next(index for index, by_rank in enumerate(ends) if max(by_rank) > now_s)
        has_come = ends[layer][rank] <= now_s
        number = self.num_collectives + layer + 1
        is_hung = self.hang is not None and self.hang.rank == rank and now_s >= self.hang.at_s and not has_come
        state = self.hang.process_state if is_hung and self.hang is not None else "S" if has_come else "R"
        if state == "R":
            self.cpu_s[rank] += LOOK_S
        axis = AxisSample(number, number, 1.0, Operation.ALL_REDUCE) if has_come else AxisSample(number - 1)
        axes = (axis, IDLE_AXIS, IDLE_AXIS, IDLE_AXIS)
        cpu_s = round(self.cpu_s[rank], 2)
        return RankSample(rank, 0, step, layer, Operation.LAYER, 0.1, axes, process_state=state, cpu_s=cpu_s)


def plan_of(step: int, num_decodes: int, prompt: tuple[int, int] | None) -> StepPlan:
    scheduled = [ScheduledRequest(slot, 500 + slot, 1, [], [], True) for slot in range(num_decodes // 2)]
    decodes = pack(list(range(num_decodes // 2, num_decodes)))
    if prompt is not None:
        scheduled.append(ScheduledRequest(num_decodes, *prompt, [], [], False))
    return StepPlan(0, step, [BatchPlan([], [], scheduled, decodes=decodes)])


@pytest.mark.parametrize("seed", range(4))
def test_an_hour_of_load_with_slow_steps_raises_no_alarm(seed: int) -> None:
    """Steps, layers and single ranks that take up to ten times as long as they did: they are busy."""
    source = random.Random(seed)
    tp = source.choice([1, 2, 4])
    gang, watchdog, times = SimulatedGang(tp), Watchdog(ParallelConfig(tp=tp)), StepTimes()
    unit_s = 10 ** (-3.2 + 0.5 * seed)  # of a token; the slowest steps take minutes
    now_s, step, longest_s = 0.0, 0, 0.0
    while now_s < 3600.0:
        position = 0
        num_chunks = source.randrange(6)
        for chunk in range(num_chunks + 3):
            prompt = (position, 256) if chunk < num_chunks else None
            position += 256
            plan = plan_of(step, source.randrange(1, 9), prompt)
            num_tokens = plan.batches[0].num_tokens
            layer_s = unit_s * (8 + num_tokens * (1 + position / 4096)) / NUM_LAYERS
            # The whole step, one of its ranks, or one of its layers.
            slow = 10.0 if step > 20 and source.random() < 0.2 else 1.0
            slow_rank, slow_layer = source.choice([(None, None), (source.randrange(tp), None), (None, step % 12)])

            def layer_of(
                layer: int,
                rank: int,
                layer_s: float = layer_s,
                slow: float = slow,
                slow_rank: int | None = slow_rank,
                slow_layer: int | None = slow_layer,
            ) -> float:
                is_slow = slow_rank in (None, rank) and slow_layer in (None, layer)
                return layer_s * (slow if is_slow else 1.0)

            began_s = now_s
            watchdog.rest()
            for now_s, samples, has_ended in gang.step(step, began_s, layer_of):
                if has_ended:
                    times.observe(plan, now_s - began_s)
                    longest_s = max(longest_s, now_s - began_s)
                else:
                    pending = PendingPlan(step, range(tp), times.predict(plan))
                    assert watchdog.observe(now_s, samples, pending) == []
            step += 1
    assert longest_s > 1.0, "some steps must be long enough to be looked at"


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(
    ("process_state", "within_s", "why"), [("T", 2.0, "is stopped"), ("S", 2.5, "sleeps"), ("X", 1.0, "has ended")]
)
def test_a_rank_that_hangs_is_named(tp: int, process_state: str, within_s: float, why: str) -> None:
    source = random.Random(tp)
    for _ in range(50):
        hang = Hang(source.randrange(tp), source.uniform(0.0, 10.0), process_state)
        verdict, named_s = until_verdict(tp, hang)
        assert (verdict.rank, verdict.is_final) == (hang.rank, True)
        assert why in verdict.reason and "of layer" in verdict.reason
        assert named_s - hang.at_s <= within_s + 0.1  # the layer that it was in takes 0.1 s


def until_verdict(tp: int, hang: Hang) -> tuple[Verdict, float]:
    gang, watchdog, now_s = SimulatedGang(tp, hang), Watchdog(ParallelConfig(tp=tp)), 0.0
    for step in range(100):
        watchdog.rest()
        began_s = now_s
        for look_s, samples, has_ended in gang.step(step, began_s, lambda layer, rank: 0.1):
            now_s = look_s
            verdicts = [] if has_ended else watchdog.observe(now_s, samples, PendingPlan(step, range(tp), 1.2))
            if verdicts:
                assert all(watchdog.state_of(sample) is not RankState.STALLED for sample in samples[: hang.rank])
                return verdicts[0], now_s
    raise AssertionError("nobody was named")


def test_a_rank_that_computes_for_ever_is_named_when_its_plan_is_overdue() -> None:
    """It takes processor time and waits for nobody: only the prediction tells."""
    verdict, named_s = until_verdict(2, Hang(1, 3.0, "R"))
    assert verdict.rank == 1 and verdict.is_final and "were expected" in verdict.reason
    assert 12 * 1.2 <= named_s <= 12 * 1.2 + 3.0


def waiting(rank: int, number: int, *, report_age_s: float = 0.0, entered: int | None = None) -> RankSample:
    axis = AxisSample(number if entered is None else entered, number, 1.0, Operation.ALL_REDUCE)
    axes = (axis, IDLE_AXIS, IDLE_AXIS, IDLE_AXIS)
    return RankSample(rank, 0, 5, 3, Operation.LAYER, 1.0, axes, "S", 1.0, report_age_s)


def computing(rank: int, number: int, *, report_age_s: float = 0.0) -> RankSample:
    axes = (AxisSample(number), IDLE_AXIS, IDLE_AXIS, IDLE_AXIS)
    return RankSample(rank, 0, 5, 3, Operation.LAYER, 1.0, axes, "R", 1.0, report_age_s)


def verdicts_over(seconds: float, samples: Callable[[float], list[RankSample]], predicted_s: float) -> list[Verdict]:
    watchdog = Watchdog(ParallelConfig(tp=len(samples(0.0))))
    found = []
    for look in range(int(seconds / LOOK_S)):
        now_s = look * LOOK_S
        found += watchdog.observe(now_s, samples(now_s), PendingPlan(5, [0, 1], predicted_s))
    return found


def test_a_host_that_falls_silent_is_named_and_then_given_up() -> None:
    """Links heal by themselves: for a while it is only suspected."""
    verdicts = verdicts_over(10.0, lambda now_s: [waiting(0, 9), computing(1, 8, report_age_s=now_s)], 1.0)
    assert [(verdict.rank, verdict.is_final) for verdict in verdicts] == [(1, False), (1, True)]
    assert all("its host reports nothing" in verdict.reason for verdict in verdicts)
    healed = verdicts_over(
        10.0,
        lambda now_s: [waiting(0, 9), computing(1, 8 + (now_s > 3), report_age_s=now_s if now_s < 3 else 0.1)],
        9.0,
    )
    assert [verdict.is_final for verdict in healed] == [False]


def test_a_message_lost_on_the_way_is_nobodys_fault() -> None:
    verdicts = verdicts_over(30.0, lambda now_s: [waiting(0, 9), waiting(1, 9)], 1.0)
    assert [verdict.rank for verdict in verdicts] == [None]
    assert "all wait for each other" in verdicts[0].reason and "rank 1 in step 5, all-reduce 9" in verdicts[0].reason


def test_a_rank_that_is_stopped_when_all_others_have_come_is_named() -> None:
    """It waited for them, and was stopped before it could see them."""
    stopped = replace(waiting(1, 8), process_state="T")
    verdicts = verdicts_over(3.0, lambda now_s: [waiting(0, 9), stopped], 1.0)
    assert [verdict.rank for verdict in verdicts] == [1] and "is stopped" in verdicts[0].reason
    verdicts = verdicts_over(30.0, lambda now_s: [waiting(0, 9), waiting(1, 8)], 1.0)
    assert [verdict.rank for verdict in verdicts] == [1] and "were expected" in verdicts[0].reason


def test_time_in_which_nobody_watched_does_not_count() -> None:
    """A suspended host: the clock has jumped, and nothing has moved."""
    watchdog = Watchdog(ParallelConfig(tp=2))
    samples = [waiting(0, 9), computing(1, 8)]
    for look in range(20):
        assert watchdog.observe(look * 3600.0, samples, PendingPlan(5, [0, 1], 1.0)) == []


def test_who_waits_along_a_chain_is_not_blamed() -> None:
    """Stage 1 waits for stage 0, where rank 0 waits for rank 1, which is stopped."""
    watchdog = Watchdog(ParallelConfig(tp=2, pp=2))
    receive = AxisSample(4, 5, 2.0, Operation.RECEIVE)
    samples = [
        waiting(0, 9),
        RankSample(1, 0, 5, 3, Operation.LAYER, 1.0, (AxisSample(8),) + (IDLE_AXIS,) * 3, "T", 1.0),
        *(
            RankSample(rank, 0, 5, 6, Operation.BEGIN, 2.0, (IDLE_AXIS, IDLE_AXIS, receive, IDLE_AXIS), "S", 1.0)
            for rank in (2, 3)
        ),
    ]
    found: list[Verdict] = []
    for look in range(20):
        found += watchdog.observe(look * LOOK_S, samples, PendingPlan(5, [2, 3], 1.0))
    assert [verdict.rank for verdict in found] == [1]


def test_predictions_grow_with_tokens_and_with_their_context() -> None:
    times = StepTimes()
    assert times.predict(plan_of(0, 1, None)) is None
    for _ in range(50):
        times.observe(plan_of(0, 4, None), 0.02)
        times.observe(plan_of(0, 4, (0, 256)), 0.5)
    decode, prompt = times.predict(plan_of(0, 4, None)), times.predict(plan_of(0, 4, (0, 256)))
    late, long = times.predict(plan_of(0, 4, (16384, 256))), times.predict(plan_of(0, 4, (0, 1024)))
    assert decode is not None and prompt is not None and late is not None and long is not None
    assert 0.02 <= decode < 0.1 and 0.45 < prompt < 1.0
    assert long > 3 * prompt and late > 8 * prompt
    times.observe(plan_of(0, 4, (0, 256)), 5.0)
    slower = times.predict(plan_of(0, 4, (0, 256)))
    assert slower is not None and slower > 4.5, "a slow step is remembered at once"
