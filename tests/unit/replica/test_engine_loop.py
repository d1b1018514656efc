"""The engine's thread: in between steps, out once per turn, asleep when idle, and one end for each request."""

import threading
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from cluster.errors import Draining, Unavailable
from cluster.replica import engine_loop
from cluster.replica.engine_loop import EngineLoop, StepOutputs
from cluster.types import ReplicaState
from engine.errors import EngineFailure, InvalidRequest, Overloaded, RankFailure, RemudaError
from engine.request import Request, SamplingParams
from tests.support.scripted_engine import ScriptedEngine, answer

WAIT_S = 20.0


class Harness:
    """A loop over a scripted engine, and all that it published."""

    def __init__(self) -> None:
        self.engine = ScriptedEngine()
        self.now_s = 100.0
        self.loop = EngineLoop(self.engine, clock=lambda: self.now_s)
        self.steps: list[StepOutputs] = []
        self._changed = threading.Condition()

    def publish(self, step: StepOutputs) -> None:
        with self._changed:
            self.steps.append(step)
            self._changed.notify_all()

    def tokens(self, request_id: str) -> list[int]:
        return [
            token
            for step in self.steps
            for out in step.outputs
            if out.request_id == request_id
            for token in out.token_ids
        ]

    def ends(self) -> Counter[str]:
        ends: Counter[str] = Counter()
        for step in self.steps:
            ends.update(out.request_id for out in step.outputs if out.finish_reason is not None)
            ends.update(request_id for request_id, _ in step.errors)
        return ends

    def errors(self) -> dict[str, RemudaError]:
        return {request_id: error for step in self.steps for request_id, error in step.errors}

    def wait_for_ends(self, *request_ids: str) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: set(request_ids) <= self.ends().keys(), WAIT_S), self.steps


@pytest.fixture
def harness() -> Iterator[Harness]:
    harness = Harness()
    yield harness
    harness.engine.gate.set()
    assert harness.loop.stop(WAIT_S)


def request(name: str, max_tokens: int = 5) -> Request:
    return Request(name, [1, 2, 3], 3, SamplingParams(max_tokens=max_tokens, seed=len(name)))


def test_requests_run_to_their_end(harness: Harness) -> None:
    harness.loop.start(harness.publish)
    wanted = [request(f"r{'x' * index}", index + 1) for index in range(20)]
    for each in wanted:
        harness.loop.submit(each)
    harness.wait_for_ends(*(each.request_id for each in wanted))
    assert all(harness.tokens(each.request_id) == answer(each) for each in wanted)
    assert set(harness.ends().values()) == {1}
    assert not harness.errors()


def test_one_publication_per_step_and_none_when_idle(harness: Harness) -> None:
    harness.loop.start(harness.publish)
    harness.engine.gate.clear()
    harness.loop.submit(request("a", 10))
    assert harness.engine.entered.wait(WAIT_S)
    for name in "bcd":
        harness.loop.submit(request(name, 10))
    harness.engine.gate.set()
    harness.wait_for_ends(*"abcd")
    # "a" has one step of its own before the others come in between.
    assert harness.engine.num_steps == len(harness.steps) == 11
    assert harness.loop.load().num_steps == 11


def test_the_idle_thread_uses_no_cpu(harness: Harness) -> None:
    harness.loop.start(harness.publish)
    harness.loop.submit(request("a"))
    harness.wait_for_ends("a")
    thread = next(thread for thread in threading.enumerate() if thread.name == "engine-loop")
    clock = time.pthread_getcpuclockid(thread.ident or 0)
    before = time.clock_gettime(clock)
    time.sleep(0.3)
    assert time.clock_gettime(clock) - before < 0.003


def test_an_abort_stops_the_work_within_one_step(harness: Harness) -> None:
    harness.loop.start(harness.publish)
    harness.engine.gate.clear()
    harness.loop.submit(request("a", 1000))
    assert harness.engine.entered.wait(WAIT_S)
    harness.loop.abort("a")
    harness.loop.abort("never-seen")
    harness.engine.gate.set()
    harness.loop.submit(request("b", 3))
    harness.wait_for_ends("b")
    assert harness.engine.aborted == ["a"]
    assert len(harness.tokens("a")) == 1


def test_a_refusal_ends_only_its_own_request(harness: Harness) -> None:
    harness.engine.refuses = {"bad": InvalidRequest("top_k is bad", "top_k"), "full": Overloaded("full", 3.0)}
    harness.loop.start(harness.publish)
    for name in ("bad", "good", "full"):
        harness.loop.submit(request(name))
    harness.wait_for_ends("bad", "good", "full")
    assert harness.errors() == harness.engine.refuses
    assert set(harness.ends().values()) == {1}


def test_a_second_request_of_a_live_id_is_refused(harness: Harness) -> None:
    harness.engine.gate.clear()
    harness.loop.start(harness.publish)
    harness.loop.submit(request("a"))
    harness.loop.submit(request("a", 2))
    harness.engine.gate.set()
    harness.wait_for_ends("a")
    assert isinstance(harness.errors()["a"], InvalidRequest)
    assert harness.engine.aborted == []


@pytest.mark.parametrize("error", [RankFailure("rank 1 died", rank=1), EngineFailure("odd"), KeyError("a defect")])
def test_a_failed_engine_ends_every_request_once(harness: Harness, error: BaseException) -> None:
    harness.loop.start(harness.publish)
    harness.engine.gate.clear()
    harness.engine.refuses = {"refused": InvalidRequest("no")}
    harness.loop.submit(request("running", 50))
    assert harness.engine.entered.wait(WAIT_S)
    for name in ("waiting", "refused", "gone"):
        harness.loop.submit(request(name, 50))
    harness.loop.abort("gone")
    harness.engine.fails_with = error
    harness.engine.gate.set()
    harness.wait_for_ends("running", "waiting", "refused")
    assert harness.ends().keys() - {"refused"} == {"running", "waiting"}
    assert set(harness.ends().values()) == {1}
    found = harness.errors()["running"]
    assert found is error if isinstance(error, EngineFailure) else "KeyError" in str(found)
    assert harness.loop.state is ReplicaState.FAILED
    assert harness.steps[-1].failure is harness.loop.failure is not None
    with pytest.raises(Unavailable, match="failed"):
        harness.loop.submit(request("late"))


def test_draining_refuses_what_is_new_and_ends_what_runs(harness: Harness) -> None:
    harness.loop.start(harness.publish)
    harness.engine.gate.clear()
    harness.loop.submit(request("a"))
    harness.loop.drain()
    with pytest.raises(Draining):
        harness.loop.submit(request("b"))
    harness.engine.gate.set()
    harness.wait_for_ends("a")
    assert harness.tokens("a") == answer(request("a"))
    assert harness.loop.state is ReplicaState.DRAINING


def test_stopping_ends_what_runs_with_unavailable(harness: Harness) -> None:
    harness.loop.start(harness.publish)
    harness.engine.gate.clear()
    harness.loop.submit(request("a", 1000))
    assert harness.engine.entered.wait(WAIT_S)
    assert not harness.loop.stop(timeout_s=0.05), "the step has not ended"
    harness.engine.gate.set()
    assert harness.loop.stop(WAIT_S)
    assert harness.ends() == {"a": 1}
    assert type(harness.errors()["a"]) is Unavailable
    assert harness.loop.state is ReplicaState.DRAINING


def test_the_inbox_is_bounded(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_loop, "MAX_INBOX", 3)
    harness.loop.start(harness.publish)
    harness.engine.gate.clear()
    harness.loop.submit(request("a"))
    assert harness.engine.entered.wait(WAIT_S)
    for name in "bcd":
        harness.loop.submit(request(name))
    assert harness.loop.load().num_waiting == 3
    with pytest.raises(Overloaded, match="3 requests"):
        harness.loop.submit(request("e"))
    harness.engine.gate.set()
    harness.wait_for_ends(*"abcd")


def test_before_the_start_nothing_is_taken() -> None:
    loop = EngineLoop(ScriptedEngine())
    assert loop.state is ReplicaState.STARTING
    with pytest.raises(Unavailable, match="starting"):
        loop.submit(request("a"))


def test_progress_ages_only_while_there_is_work(harness: Harness) -> None:
    harness.loop.start(harness.publish)
    harness.now_s += 50
    assert harness.loop.load().progress_age_s == 0.0
    harness.engine.gate.clear()
    harness.loop.submit(request("a"))
    assert harness.engine.entered.wait(WAIT_S)
    harness.now_s += 7
    assert harness.loop.load().progress_age_s == 7.0
    harness.engine.gate.set()
    harness.wait_for_ends("a")
    deadline = time.monotonic() + WAIT_S
    while harness.loop.load().progress_age_s and time.monotonic() < deadline:
        time.sleep(0.001)
    harness.now_s += 7
    assert harness.loop.load().progress_age_s == 0.0


def test_what_comes_during_a_repair_waits_for_its_end() -> None:
    harness = Harness()
    mended, is_broken = threading.Event(), threading.Event()

    def repair(failure: EngineFailure) -> None:
        is_broken.set()
        assert mended.wait(WAIT_S)

    harness.loop = EngineLoop(harness.engine, clock=lambda: harness.now_s, repair=repair)
    harness.loop.start(harness.publish)
    harness.loop.fail(RankFailure("rank 1 died", rank=1))
    assert is_broken.wait(WAIT_S)
    assert harness.loop.state.value == "repairing"
    harness.loop.submit(request("a"))
    mended.set()
    harness.wait_for_ends("a")
    assert harness.tokens("a") == answer(request("a"))
    assert harness.loop.state.value == "ready"
    assert harness.loop.stop(WAIT_S)


def test_a_replica_that_drains_while_it_is_repaired_goes_on_draining() -> None:
    harness = Harness()
    mended, is_broken = threading.Event(), threading.Event()

    def repair(failure: EngineFailure) -> None:
        is_broken.set()
        assert mended.wait(WAIT_S)

    harness.loop = EngineLoop(harness.engine, clock=lambda: harness.now_s, repair=repair)
    harness.loop.start(harness.publish)
    harness.loop.submit(request("a"))
    harness.wait_for_ends("a")
    harness.loop.fail(RankFailure("rank 1 died", rank=1))
    assert is_broken.wait(WAIT_S)
    harness.loop.drain()
    assert harness.loop.state.value == "draining"
    mended.set()
    assert harness.loop.stop(WAIT_S)
    assert harness.loop.state.value == "draining"
