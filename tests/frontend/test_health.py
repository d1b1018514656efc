"""Alive and ready, on a clock that the test moves."""

from cluster.frontend.health import Health, Progress
from cluster.types import RankInfo, ReplicaInfo, ReplicaState
from tests.frontend.scripted import FakeClock, replica_info


class Watched:
    def __init__(self) -> None:
        self.infos: list[ReplicaInfo] = []
        self.is_draining = False
        self.clock = FakeClock()
        self.health = Health(lambda: self.infos, lambda: self.is_draining, self.clock, stall_s=30)


def test_work_without_steps_is_a_stall_and_steps_end_it() -> None:
    one = Watched()
    one.infos = [replica_info(num_running=2, num_steps=10)]
    assert one.health.live() == (True, {"r0": Progress.BUSY})
    one.clock.advance(29)
    assert one.health.live() == (True, {"r0": Progress.BUSY})
    one.clock.advance(2)
    assert one.health.live() == (False, {"r0": Progress.STALLED})
    one.infos = [replica_info(num_running=2, num_steps=11)]
    assert one.health.live() == (True, {"r0": Progress.BUSY})


def test_waiting_requests_are_work_too() -> None:
    one = Watched()
    one.infos = [replica_info(num_waiting=1, num_steps=10)]
    one.health.observe()
    one.clock.advance(31)
    assert one.health.live()[0] is False


def test_an_idle_replica_need_not_step() -> None:
    one = Watched()
    one.infos = [replica_info(num_steps=10)]
    one.health.observe()
    one.clock.advance(3600)
    assert one.health.live() == (True, {"r0": Progress.IDLE})
    one.infos = [replica_info(num_steps=10, num_running=1)]
    assert one.health.live() == (True, {"r0": Progress.BUSY})
    one.clock.advance(31)
    assert one.health.live()[0] is False


def test_a_new_incarnation_starts_anew() -> None:
    one = Watched()
    one.infos = [replica_info(num_running=1, num_steps=10)]
    one.health.observe()
    one.clock.advance(31)
    one.infos = [replica_info(num_running=1, num_steps=10, incarnation=2)]
    assert one.health.live()[0] is True


def test_one_moving_replica_keeps_the_process_alive() -> None:
    one = Watched()
    stuck = replica_info(id="a", num_running=1)
    one.infos = [stuck, replica_info(id="b", num_running=1, num_steps=1)]
    one.health.observe()
    one.clock.advance(31)
    one.infos = [stuck, replica_info(id="b", num_running=1, num_steps=2)]
    assert one.health.live() == (True, {"a": Progress.STALLED, "b": Progress.BUSY})


def slow(age_s: float) -> ReplicaInfo:
    return replica_info(num_running=1, num_steps=10, progress_limit_s=300.0, progress_age_s=age_s)


def test_the_leader_says_how_long_a_step_may_take() -> None:
    one = Watched()
    for age_s in (0.0, 100.0, 290.0):  # far beyond what is a stall where nobody knows: a long, legal step
        one.infos = [slow(age_s)]
        assert one.health.live() == (True, {"r0": Progress.BUSY})
        assert one.health.ready() == (True, "ready")
        one.clock.advance(100)
    one.infos = [slow(310.0)]
    assert one.health.live() == (False, {"r0": Progress.STALLED})
    assert one.health.ready() == (False, "no replica is ready: r0 is stalled")
    one.infos = [slow(0.0)]  # it is being repaired, or goes on
    assert one.health.live()[0] is True


def test_a_replica_with_a_hanging_rank_is_alive_but_not_ready() -> None:
    """It is replaced within bounds; a restart of everything would take longer."""
    one = Watched()
    ranks = (RankInfo(0, 1, "h", "cpu", "busy"), RankInfo(1, 2, "h", "cpu", "stalled"))
    one.infos = [replica_info(id="a", num_running=1, ranks=ranks), replica_info(id="b")]
    assert one.health.ready() == (True, "ready"), "the other one serves"
    one.infos = one.infos[:1]
    assert one.health.ready() == (False, "no replica is ready: a is stalled")
    assert one.health.live()[0] is True


def test_a_repair_is_no_stall() -> None:
    """It has bounds of its own; a restart would throw away what it saves."""
    one = Watched()
    one.infos = [replica_info(ReplicaState.REPAIRING, num_running=1)]
    assert one.health.live()[0] is True
    one.clock.advance(300)
    assert one.health.live()[0] is True
    assert one.health.ready() == (False, "no replica is ready: r0 is repairing")


def test_ready_needs_a_ready_replica_and_no_drain() -> None:
    one = Watched()
    assert one.health.ready() == (False, "no replica is ready: none has joined")
    for state in (ReplicaState.STARTING, ReplicaState.DRAINING, ReplicaState.FAILED, ReplicaState.REPAIRING):
        one.infos = [replica_info(state)]
        assert one.health.ready() == (False, f"no replica is ready: r0 is {state}")
        assert one.health.live()[0] is True
    one.infos = [replica_info(ReplicaState.FAILED), replica_info(id="r1")]
    assert one.health.ready()[0] is True
    one.is_draining = True
    assert one.health.ready() == (False, "draining")
