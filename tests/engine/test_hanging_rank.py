"""Real processes that are stopped in the middle of a step: named while their peers wait, and nobody else is."""

import os
import signal
import time

import pytest

from engine.errors import RankFailure
from engine.executor.watchdog import RankState
from engine.progress import NO_LAYER, Axis, Operation
from tests.parity.reference import Reference
from tests.support.gang_engine import ForkedGangEngine, GangEngine, gang_engine, make_request

pytestmark = pytest.mark.timeout(90)
NAMED_WITHIN_S = 2.0


def step_until_it_fails(served: GangEngine) -> RankFailure:
    with pytest.raises(RankFailure) as failure:
        while True:
            served.engine.step()
    return failure.value


def check_counters(served: ForkedGangEngine, prompt: list[int]) -> None:
    """They follow the steps, are the same on all ranks, and rest between requests."""
    assert served.run([make_request("first", prompt, max_tokens=5)])["first"]
    samples = [report.sample for report in served.gang.reports()]
    num_steps = served.engine.stats().num_steps
    for sample in samples:
        assert (sample.step, sample.operation, sample.layer) == (num_steps - 1, Operation.IDLE, NO_LAYER)
        assert sample.axes[Axis.TP].entered == samples[0].axes[Axis.TP].entered > 5
        assert not sample.waits
    assert {report.state for report in served.gang.reports()} == {RankState.IDLE}


@pytest.mark.parametrize("tp", [2, 4])
def test_a_stopped_rank_is_named_within_two_seconds(
    dense: Reference, tp: int, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = tp - 1
    with gang_engine(dense, tp=tp, kv_cache_memory_bytes=2**24) as served:
        check_counters(served, dense.prompts[0])
        for name in ("a", "b"):
            served.engine.add(make_request(name, dense.prompts[0], max_tokens=40))
        for _ in range(20):
            served.engine.step()
        process = served.gang.processes[stopped]
        os.kill(process.pid, signal.SIGSTOP)
        stopped_at = time.monotonic()
        failure = step_until_it_fails(served)
        took_s = time.monotonic() - stopped_at
        reports = served.gang.reports()
        waited_s = max(report.sample.axes[Axis.TP].wait_age_s for report in reports)
        with capsys.disabled():
            print(f"\ntp={tp}: rank {stopped} named {took_s:.2f} s after SIGSTOP, peers had waited {waited_s:.2f} s")
        assert failure.rank == stopped and "is stopped" in str(failure)
        assert 1.0 <= waited_s <= NAMED_WITHIN_S
        assert [report.state for report in reports] == [RankState.BUSY] * (tp - 1) + [RankState.STALLED]
        assert all(report.sample.axes[Axis.TP].waits_in for report in reports[:stopped])
        assert Operation(reports[0].sample.axes[Axis.TP].operation) in (
            Operation.ALL_REDUCE,
            Operation.GATHER,
            Operation.BROADCAST,
        )
        process.kill()
