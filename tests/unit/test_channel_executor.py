"""The leader's side of a gang, with ranks that follow a script: who is blamed, what is refused, what futures say."""

import threading
import uuid
from collections.abc import Callable, Iterator

import pytest

from engine.config import ParallelConfig
from engine.errors import CheckpointError, ProtocolViolation, RankFailure
from engine.executor.channel import ChannelClosed, RankChannel
from engine.executor.channel_executor import ChannelExecutor
from engine.executor.gang_start import GangReady
from engine.executor.handshake import new_secret
from engine.executor.socket_hub import SocketHub
from engine.executor.socket_rank import SocketRankChannel
from engine.layer_config import LayerConfig
from engine.messages import (
    BatchPlan,
    Hello,
    InitCache,
    Loaded,
    LoadProgress,
    RankError,
    Ready,
    SampledToken,
    Shutdown,
    StepPlan,
    StepResult,
    ToRank,
    decode_to_rank,
    encode,
)
from engine.model_config import ModelConfig
from engine.rope_config import RopeConfig

WAIT_S = 20.0
MODEL = ModelConfig("none", 9, 8, 2, 2, 4, (LayerConfig(8),), RopeConfig(1e4, 4, 100), 1e-5, 100)
PLAN = [StepPlan(0, step, [BatchPlan([], [], [])]) for step in range(9)]


class Script:
    """One rank, told what to do line by line."""

    def __init__(self, channel: RankChannel, rank: int) -> None:
        self.channel, self.rank = channel, rank

    def send(self, message: object) -> None:
        self.channel.send(encode(message))  # type: ignore[arg-type]

    def receive(self) -> ToRank:
        return decode_to_rank(self.channel.receive(WAIT_S))

    def start(self) -> None:
        self.send(Hello(0, self.rank, 1, "host", "cpu"))
        self.send(LoadProgress(self.rank, "load", 5, 5))
        self.send(Loaded(self.rank, 50, 1000 + self.rank, 10, {"load": 1.0 + self.rank}))
        message = self.receive()
        if isinstance(message, Shutdown):
            raise ChannelClosed("the start was called off")
        assert message == InitCache(0, 100, 100)
        self.send(Ready(self.rank, {"load": 1.0 + self.rank, "warm_up": 2.0}))

    def answer(self, step: int | None = None) -> bool:
        """False: told to leave instead."""
        plan = self.receive()
        if not isinstance(plan, StepPlan):
            return False
        sampled = [SampledToken(plan.step, self.rank)]
        self.send(StepResult(plan.epoch, plan.step if step is None else step, self.rank, sampled))
        return True

    def fail(self, kind: str, message: str) -> None:
        self.send(RankError(0, 0, self.rank, kind, message, "where it happened"))


Play = Callable[[Script], None]


class Stage:
    """A gang of scripted ranks."""

    def __init__(
        self, plays: list[Play], parallel: ParallelConfig | None = None, step_timeout_s: float = WAIT_S
    ) -> None:
        secret = new_secret()
        self.hub = SocketHub(range(len(plays)), secret, [f"unix:@remuda-test-{uuid.uuid4().hex}"])
        self.executor = ChannelExecutor(
            self.hub,
            parallel or ParallelConfig(tp=len(plays)),
            stall_timeout_s=1.0,
            step_timeout_s=step_timeout_s,
            on_failure=self._on_failure,
            host_of=lambda rank: f"host-{rank}",
        )
        self.failures: list[BaseException] = []
        self.failed = threading.Event()
        self.errors: list[BaseException] = []
        self.threads = [
            threading.Thread(target=self._play, args=(play, rank, secret)) for rank, play in enumerate(plays)
        ]
        for thread in self.threads:
            thread.start()

    def _play(self, play: Play, rank: int, secret: str) -> None:
        channel = SocketRankChannel(self.hub.addresses[0], secret, [rank], WAIT_S)
        try:
            play(Script(channel, rank))
        except ChannelClosed:
            pass
        except BaseException as error:
            self.errors.append(error)
        finally:
            channel.close()

    def _on_failure(self, error: BaseException) -> None:
        self.failures.append(error)
        self.executor.close()
        self.failed.set()

    def start(self) -> GangReady:
        return self.executor.start(MODEL, block_size=4)

    def close(self) -> None:
        self.executor.close()
        for thread in self.threads:
            thread.join(WAIT_S)
        assert self.errors == []


@pytest.fixture
def stage() -> Iterator[Callable[..., Stage]]:
    stages: list[Stage] = []

    def make(*plays: Play, **options: object) -> Stage:
        stages.append(Stage(list(plays), **options))  # type: ignore[arg-type]
        return stages[-1]

    yield make
    for opened in stages:
        opened.close()


Make = Callable[..., Stage]


def obedient(script: Script) -> None:
    script.start()
    while script.answer():
        pass


def quiet(script: Script) -> None:
    """Ready, and then nothing, like a stopped process."""
    script.start()
    while not isinstance(script.receive(), Shutdown):
        pass


def test_start_sizes_the_cache_by_the_tightest_rank(stage: Make) -> None:
    ready = stage(obedient, obedient).start()
    assert (ready.cache.num_blocks, ready.cache.block_size, ready.max_model_len) == (100, 4, 100)
    assert [hello.rank for hello in ready.ranks] == [0, 1] and ready.weight_bytes == (50, 50)
    assert ready.phase_seconds == {"load": 2.0, "warm_up": 2.0}


def test_futures_end_in_order_with_the_sampling_rank_of_each_group(stage: Make) -> None:
    opened = stage(*[obedient] * 4, parallel=ParallelConfig(tp=2, dp=2))
    opened.start()
    futures = [opened.executor.submit(plan) for plan in PLAN[:4]]
    for step, future in enumerate(futures):
        results = future.result(WAIT_S)
        assert [(r.rank, r.step, r.sampled[0].slot) for r in results] == [(0, step, step), (2, step, step)]


def test_a_future_waits_for_every_rank(stage: Make) -> None:
    gate = threading.Event()

    def late(script: Script) -> None:
        script.start()
        gate.wait(WAIT_S)
        script.answer()

    opened = stage(obedient, late)
    opened.start()
    future = opened.executor.submit(PLAN[0])
    with pytest.raises(TimeoutError):
        future.result(0.2)
    gate.set()
    assert len(future.result(WAIT_S)) == 1


def test_a_rank_that_dies_fails_all_plans_in_flight_and_later_ones(stage: Make) -> None:
    def dies(script: Script) -> None:
        script.start()
        script.answer()
        script.receive()

    opened = stage(obedient, dies)
    opened.start()
    assert opened.executor.submit(PLAN[0]).result(WAIT_S)
    futures = [opened.executor.submit(plan) for plan in PLAN[1:3]]
    for future in [*futures, opened.executor.submit(PLAN[3])]:
        with pytest.raises(RankFailure, match="rank 1") as failure:
            future.result(WAIT_S)
        assert failure.value.rank == 1
    assert isinstance(opened.executor.failure, RankFailure)


def test_a_rank_that_raised_is_named_with_its_error(stage: Make) -> None:
    def raises(script: Script) -> None:
        script.start()
        script.receive()
        script.fail("ProtocolViolation", "no such slot")

    opened = stage(obedient, raises)
    opened.start()
    with pytest.raises(ProtocolViolation, match="rank 1: no such slot") as failure:
        opened.executor.submit(PLAN[0]).result(WAIT_S)
    assert failure.value.__notes__ == ["where it happened"]


def test_the_rank_that_is_gone_is_blamed_not_the_one_that_noticed(stage: Make) -> None:
    reported = threading.Event()

    def notices(script: Script) -> None:
        script.start()
        script.receive()
        script.fail("RankFailure", "all-to-all failed")
        reported.set()
        script.receive()

    def dies(script: Script) -> None:
        script.start()
        reported.wait(WAIT_S)
        threading.Event().wait(0.2)  # the end of a process may be seen later than what it caused

    opened = stage(notices, dies)
    opened.start()
    with pytest.raises(RankFailure, match="rank 1 is lost") as failure:
        opened.executor.submit(PLAN[0]).result(WAIT_S)
    assert failure.value.rank == 1


def test_the_one_silent_rank_is_blamed_for_what_all_others_report(stage: Make) -> None:
    def notices(script: Script) -> None:
        script.start()
        script.receive()
        script.fail("RankFailure", "all-to-all timed out")

    opened = stage(notices, quiet, notices)
    opened.start()
    with pytest.raises(RankFailure, match="rank 1 does not answer.*timed out") as failure:
        opened.executor.submit(PLAN[0]).result(WAIT_S)
    assert failure.value.rank == 1


def test_a_step_that_hangs_ends_in_bounded_time(stage: Make, caplog: pytest.LogCaptureFixture) -> None:
    opened = stage(obedient, quiet, step_timeout_s=0.3)
    opened.start()
    with pytest.raises(RankFailure, match=r"step 0 was not answered within 0\.3 s by rank 1") as failure:
        opened.executor.submit(PLAN[0]).result(WAIT_S)
    assert failure.value.rank == 1
    assert [record.getMessage() for record in caplog.records] == [f"{failure.value}; rank 1 is on host-1"]


def test_a_loss_is_told_once_while_nothing_is_in_flight(stage: Make) -> None:
    """Also to one who closes the gang at once, in the thread that tells."""

    started = threading.Event()

    def leaves(script: Script) -> None:
        script.start()
        started.wait(WAIT_S)

    opened = stage(quiet, leaves)
    opened.start()
    started.set()
    assert opened.failed.wait(WAIT_S)
    with pytest.raises(RankFailure, match="rank 1"):
        opened.executor.submit(PLAN[0]).result(WAIT_S)
    assert [str(failure) for failure in opened.failures] == ["rank 1 is lost: its connection ended"]


def test_closing_is_no_failure(stage: Make) -> None:
    opened = stage(obedient)
    opened.start()
    opened.executor.close()
    assert opened.failures == []


def test_idleness_is_no_hang(stage: Make) -> None:
    opened = stage(obedient, step_timeout_s=0.2)
    opened.start()
    assert not threading.Event().wait(0.5)
    assert opened.executor.submit(PLAN[0]).result(WAIT_S) and opened.executor.failure is None


@pytest.mark.parametrize("step", [1, -1])
def test_an_answer_to_another_step_is_refused(stage: Make, step: int) -> None:
    def confused(script: Script) -> None:
        script.start()
        script.answer(step)

    opened = stage(confused)
    opened.start()
    with pytest.raises(ProtocolViolation, match=f"answers step {step}"):
        opened.executor.submit(PLAN[0]).result(WAIT_S)


def test_an_answer_nobody_asked_for_is_refused(stage: Make) -> None:
    sent = threading.Event()

    def eager(script: Script) -> None:
        script.start()
        script.send(StepResult(0, 0, script.rank))
        sent.set()
        script.receive()

    opened = stage(eager)
    opened.start()
    assert sent.wait(WAIT_S)
    with pytest.raises(ProtocolViolation, match="due is none"):
        opened.executor.submit(PLAN[0]).result(WAIT_S)


def test_a_rank_may_not_speak_for_another(stage: Make) -> None:
    def pretends(script: Script) -> None:
        script.start()
        plan = script.receive()
        assert isinstance(plan, StepPlan)
        script.send(StepResult(0, plan.step, rank=1))

    opened = stage(pretends)
    opened.start()
    with pytest.raises(ProtocolViolation, match="rank 0 speaks for rank 1"):
        opened.executor.submit(PLAN[0]).result(WAIT_S)


def test_closing_fails_what_is_in_flight_and_tells_the_ranks(stage: Make) -> None:
    opened = stage(quiet, quiet)
    opened.start()
    future = opened.executor.submit(PLAN[0])
    opened.executor.close()
    with pytest.raises(RankFailure, match="closed"):
        future.result(WAIT_S)
    with pytest.raises(RankFailure):
        opened.executor.submit(PLAN[1]).result(WAIT_S)


def test_a_start_raises_what_a_rank_raised(stage: Make) -> None:
    def broken(script: Script) -> None:
        script.send(Hello(0, script.rank, 1, "host", "cpu"))
        script.fail("CheckpointError", "no such tensor")

    with pytest.raises(CheckpointError, match="rank 0: no such tensor"):
        stage(broken).start()


def test_a_start_in_which_nothing_happens_fails_naming_who_is_missing(stage: Make) -> None:
    def hangs(script: Script) -> None:
        script.send(Hello(0, script.rank, 1, "host", "cpu"))
        script.receive()

    def loads(script: Script) -> None:
        script.start()

    with pytest.raises(RankFailure, match="not ready: rank 1") as failure:
        stage(loads, hangs).start()
    assert failure.value.rank == 1


def test_a_rank_of_another_epoch_is_refused(stage: Make) -> None:
    def old(script: Script) -> None:
        script.send(Hello(7, script.rank, 1, "host", "cpu"))
        script.receive()

    with pytest.raises(ProtocolViolation, match="epoch 7"):
        stage(old).start()
