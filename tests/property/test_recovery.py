"""Whatever dies, and whenever: a gang of simulated processes is led back to serving by what recovery wants, or given up
for a reason, and nothing that is told too late makes a difference."""

import random
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.replica.recovery import (
    JOIN_TIMEOUT_S,
    MAX_REPAIRS,
    SAME_FAULT_S,
    Action,
    Form,
    GiveUp,
    KillRank,
    Phase,
    Recovery,
    StartLeader,
    StartRank,
)


@dataclass
class World:
    """Processes as the supervisor sees them. ``alive``: by rank, which life runs; -1 where none does."""

    num_ranks: int
    recovery: Recovery = field(init=False)
    now_s: float = 0.0
    alive: list[int] = field(init=False)
    hangs: set[int] = field(default_factory=set)
    leader: int = 0
    epoch: int = 0
    reasons: list[str] = field(default_factory=list)
    epochs: list[int] = field(default_factory=lambda: [0])

    def __post_init__(self) -> None:
        self.recovery = Recovery(self.num_ranks, 0.0)
        self.alive = [0] * self.num_ranks
        self._tell(0)

    def has_given_up(self) -> bool:
        return bool(self.reasons)

    def carry_out(self, actions: list[Action]) -> None:
        assert not actions or not self.has_given_up(), "after giving up there is nothing to do"
        for action in actions:
            if isinstance(action, KillRank):
                self.alive[action.rank] = -1
                self.hangs.discard(action.rank)
            elif isinstance(action, StartRank):
                assert self.alive[action.rank] == -1, "a place is emptied before it is filled"
                self.alive[action.rank] = action.life
            elif isinstance(action, StartLeader):
                self.leader = action.life
            elif isinstance(action, Form):
                self.epochs.append(action.epoch)
                self._tell(action.epoch)
            elif isinstance(action, GiveUp):
                self.reasons.append(action.reason)

    def _tell(self, epoch: int) -> None:
        self.epoch = epoch
        self.recovery.told(epoch, self.now_s)

    def form(self) -> None:
        """What happens of itself: who can joins, and when all have, the gang is formed."""
        if self.has_given_up():
            return
        here = [rank for rank in range(self.num_ranks) if self.alive[rank] >= 0 and rank not in self.hangs]
        for rank in here:
            self.recovery.rank_joined(self.epoch, rank)
        if len(here) == self.num_ranks and self.leader >= 0:
            for rank in here:
                self.recovery.rank_loaded(self.epoch, rank)
            self.recovery.formed(self.epoch)

    def settle(self) -> None:
        """Until it serves or is given up: everything dead is noticed, and time goes by."""
        for _ in range(10 * MAX_REPAIRS):
            is_whole = min(self.alive) >= 0 and not self.hangs
            if self.has_given_up() or (self.recovery.phase is Phase.SERVING and is_whole):
                return
            for rank in range(self.num_ranks):
                if self.alive[rank] < 0:
                    life = self.recovery.life_of(rank)
                    self.carry_out(self.recovery.rank_ended(rank, life, "noticed", self.now_s))
            self.form()
            self.now_s += JOIN_TIMEOUT_S + 1
            self.carry_out(self.recovery.tick(self.now_s))
            if self.hangs:  # the leader's watchdog, or its patience with a start
                self.carry_out(self.recovery.gang_broke(self.epoch, min(self.hangs), "stalled", self.now_s))
        raise AssertionError("neither serves nor gives up")


FAULTS = ["kill", "kill unseen", "stall", "broke", "leader", "late", "formed late", "time"]


@settings(max_examples=300, deadline=None)
@given(num_ranks=st.integers(1, 4), seed=st.integers(0, 2**32), faults=st.lists(st.sampled_from(FAULTS), max_size=12))
def test_every_fault_ends_in_serving_or_in_a_reason(num_ranks: int, seed: int, faults: list[str]) -> None:
    world, draw = World(num_ranks), random.Random(seed)
    recovery = world.recovery
    world.form()
    for fault in faults:
        if world.has_given_up():
            break
        rank = draw.randrange(num_ranks)
        world.now_s += draw.choice([0.0, 0.1, SAME_FAULT_S + 1])
        before = recovery.epoch, recovery.phase
        if fault in ("kill", "kill unseen"):
            life, world.alive[rank] = world.alive[rank], -1
            world.hangs.discard(rank)
            if fault == "kill" and life >= 0:
                world.carry_out(recovery.rank_ended(rank, life, "killed", world.now_s))
                assert world.has_given_up() or (world.alive[rank], recovery.epoch) == (life + 1, before[0] + 1)
        elif fault == "stall" and world.alive[rank] >= 0:
            world.hangs.add(rank)
        elif fault == "broke":
            culprit = draw.choice([None, rank])
            world.carry_out(recovery.gang_broke(recovery.epoch, culprit, "broke", world.now_s))
            assert world.has_given_up() or recovery.epoch == before[0] + 1
        elif fault == "leader":
            world.carry_out(recovery.leader_ended(recovery.leader_life, "killed", world.now_s))
            assert world.has_given_up() or world.leader == recovery.leader_life
        elif fault == "late":
            assert recovery.gang_broke(recovery.epoch - 1, rank, "late", world.now_s) == []
            assert recovery.rank_ended(rank, recovery.life_of(rank) - 1, "late", world.now_s) == []
            assert recovery.leader_ended(recovery.leader_life - 1, "late", world.now_s) == []
            assert (recovery.epoch, recovery.phase) == before
        elif fault == "formed late":
            recovery.formed(recovery.epoch - 1)
            assert recovery.phase is before[1]
        elif fault == "time":
            world.form()
    world.settle()
    assert world.epochs == sorted(set(world.epochs)), "every formation has an epoch of its own, later than the last"
    if not world.has_given_up():
        assert all(life >= 0 for life in world.alive)
        assert world.alive == [recovery.life_of(rank) for rank in range(num_ranks)]
    else:
        assert f"{MAX_REPAIRS} repairs" in world.reasons[0]


def test_what_dies_again_and_again_is_given_up_and_what_dies_now_and_then_is_not() -> None:
    quick = World(2)
    quick.form()
    for _ in range(MAX_REPAIRS + 1):
        quick.now_s += 1.0
        quick.carry_out(quick.recovery.rank_ended(1, quick.recovery.life_of(1), "it dies", quick.now_s))
        if quick.has_given_up():
            break
        quick.form()
    assert quick.reasons[0].startswith("it dies; 5 repairs in 600 s did not help")
    slow = World(2)
    slow.form()
    for _ in range(50):
        slow.now_s += 200.0
        slow.carry_out(slow.recovery.rank_ended(1, slow.recovery.life_of(1), "it dies", slow.now_s))
        slow.form()
        assert slow.recovery.phase is Phase.SERVING


def test_a_host_that_dies_is_one_fault_however_many_ranks_it_had() -> None:
    world = World(16)
    world.form()
    for rank in range(8, 16):
        world.now_s += 0.3
        world.carry_out(world.recovery.rank_ended(rank, 0, "its host died", world.now_s))
    world.form()
    assert (world.recovery.phase, world.recovery.epoch) == (Phase.SERVING, 8)


def test_a_survivor_that_does_not_join_is_replaced_but_a_newcomer_that_loads_is_waited_for() -> None:
    world = World(3)
    world.form()
    world.hangs.add(0)
    world.carry_out(world.recovery.rank_ended(2, 0, "killed", world.now_s))
    world.recovery.rank_joined(1, 1)
    world.now_s += JOIN_TIMEOUT_S + 1
    world.carry_out(world.recovery.tick(world.now_s))
    assert world.alive == [1, 0, 1]
    assert world.epoch == 2
    world.recovery.rank_joined(2, 1)
    world.now_s += 10 * JOIN_TIMEOUT_S
    assert world.recovery.tick(world.now_s) == []


def test_repairs_that_were_the_doing_of_requests_do_not_count() -> None:
    world = World(2)
    world.form()
    for _ in range(20):
        for _ in range(3):
            world.now_s += 1.0
            world.carry_out(world.recovery.gang_broke(world.epoch, 1, "a request broke it", world.now_s))
            world.form()
        world.recovery.explained(3)
    world.recovery.explained(3)
    assert world.recovery.phase is Phase.SERVING
    for _ in range(MAX_REPAIRS):
        assert not world.has_given_up()
        world.now_s += 1.0
        world.carry_out(world.recovery.gang_broke(world.epoch, 1, "it breaks by itself", world.now_s))
        world.form()
    world.carry_out(world.recovery.gang_broke(world.epoch, 1, "it breaks by itself", world.now_s))
    assert world.has_given_up()


def test_lost_leaders_do_not_use_up_the_gang_s_repairs_and_have_an_end_of_their_own() -> None:
    world = World(2)
    world.form()
    for _ in range(MAX_REPAIRS):
        assert not world.has_given_up()
        world.now_s += 1.0
        world.carry_out(world.recovery.gang_broke(world.epoch, 1, "a request breaks it", world.now_s))
        world.form()
        world.carry_out(world.recovery.leader_ended(world.leader, "killed", world.now_s))
        world.form()
    assert world.recovery.phase is Phase.SERVING
    world.carry_out(world.recovery.leader_ended(world.leader, "killed again", world.now_s))
    assert world.reasons == [f"killed again; {MAX_REPAIRS} repairs in 600 s did not help"]
    alike = World(2)
    alike.form()
    for _ in range(MAX_REPAIRS):
        alike.now_s += SAME_FAULT_S + 1
        alike.carry_out(alike.recovery.leader_ended(alike.leader, "its host died", alike.now_s))
        life = alike.recovery.life_of(0)
        alike.carry_out(alike.recovery.rank_ended(0, life, "its host died", alike.now_s + 0.3))
        alike.form()
    alike.carry_out(alike.recovery.gang_broke(alike.epoch, 1, "the first break of its own", alike.now_s + 20.0))
    assert not alike.has_given_up()


def test_what_is_given_up_is_not_begun_again() -> None:
    recovery = Recovery(2, 0.0)
    assert recovery.impossible("no host has room") == [GiveUp("no host has room")]
    assert recovery.leader_ended(recovery.leader_life, "the leader is gone", 1.0) == []
    assert recovery.rank_ended(1, recovery.life_of(1), "rank 1 died", 1.0) == []
    assert recovery.gang_broke(recovery.epoch, 0, "broken", 1.0) == []
    assert recovery.phase is Phase.FAILED


def test_only_newcomers_that_have_not_joined_are_awaited() -> None:
    """A survivor has nothing to do but to join, and is bound by a time of its own."""
    world = World(3)
    assert world.recovery.awaited == {0, 1, 2}
    world.recovery.rank_joined(0, 1)
    assert world.recovery.awaited == {0, 2}
    world.form()
    assert world.recovery.awaited == set()
    actions = world.recovery.rank_ended(2, 0, "rank 2 died", world.now_s)
    assert world.recovery.awaited == set(), "nobody has been told"
    world.carry_out(actions)
    assert world.recovery.awaited == {2}
