"""Alive and ready, on a clock that the test moves."""

from cluster.frontend.health import Health, Progress
from cluster.types import ReplicaInfo, ReplicaState
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


def test_ready_needs_a_ready_replica_and_no_drain() -> None:
    one = Watched()
    assert one.health.ready() == (False, "no replica is ready: there is none")
    for state in (ReplicaState.STARTING, ReplicaState.DRAINING, ReplicaState.FAILED):
        one.infos = [replica_info(state)]
        assert one.health.ready() == (False, f"no replica is ready: r0 is {state}")
        assert one.health.live()[0] is True
    one.infos = [replica_info(ReplicaState.FAILED), replica_info(id="r1")]
    assert one.health.ready()[0] is True
    one.is_draining = True
    assert one.health.ready() == (False, "draining")
