"""Tokens that stay on the device until the next step was launched: the same tokens, and nobody waits for them."""

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.gpu_serving import CASES, DEPTHS, Case, difference, expected_of, require_same_alone, serve
from engine.config import ParallelConfig
from engine.errors import EngineFailure
from engine.executor import late_samples, rank_startup
from engine.executor.late_samples import LateSamples
from engine.messages import BatchPlan, ScheduledRequest, StepPlan
from engine.parallel.distributed import init_distributed
from engine.progress import Operation, RankProgress
from engine.slot_table import UNREAD
from tests.support.counting_model import NAN_TOKEN, admit, make_runner, plan, tokens
from tests.support.rank_pool import RankContext, run_ranks


class SlowDevice:
    """Stands in for the events of a device: what was queued on it is done when the test says so."""

    is_free = False
    num_waits = 0

    def __init__(self, device: torch.device) -> None:
        pass

    def is_done(self) -> bool:
        return SlowDevice.is_free

    def wait(self) -> None:
        SlowDevice.num_waits += not SlowDevice.is_free


@pytest.fixture
def slow_device(monkeypatch: pytest.MonkeyPatch) -> type[SlowDevice]:
    monkeypatch.setattr(late_samples, "Copied", SlowDevice)
    monkeypatch.setattr(SlowDevice, "is_free", False)
    monkeypatch.setattr(SlowDevice, "num_waits", 0)
    return SlowDevice


def decode(slot: int, start: int, step: int) -> ScheduledRequest:
    """The token that was sampled after ``step``."""
    return ScheduledRequest(slot, start, 1, [], [], True, step)


def test_steps_are_launched_before_earlier_ones_are_read(slow_device: type[SlowDevice]) -> None:
    runner, model, _ = make_runner(late=True)
    first = runner.launch(plan(0, admit(2, [8, 9], 3), admit(0, [20, 21], 10)))
    second = runner.launch(plan(1, admit(1, [50, 51], 20), scheduled=[decode(0, 2, 0), decode(2, 2, 0)]))
    third = runner.launch(plan(2, scheduled=[decode(1, 2, 1), decode(2, 3, 1)]))
    assert slow_device.num_waits == 0
    assert [batch.token_ids.tolist() for batch in model.batches] == [[8, 9, 20, 21], [50, 51, 22, 10], [52, 11]]
    assert [batch.positions.tolist() for batch in model.batches[1:]] == [[0, 1, 2, 2], [2, 3]]
    slow_device.is_free = True
    assert tokens(first.finish()) == {2: 10, 0: 22}
    assert tokens(second.finish()) == {1: 52, 0: 23, 2: 11}
    assert tokens(third.finish()) == {1: 53, 2: 12}


def test_what_was_read_is_taken_from_the_host(slow_device: type[SlowDevice]) -> None:
    runner, model, _ = make_runner(late=True)
    runner.launch(plan(0, admit(0, [4, 5], 1)))
    slow_device.is_free = True
    runner.launch(plan(1, scheduled=[decode(0, 2, 0)]))
    assert runner._late is not None and runner._late.num_taken == 0
    assert model.batches[1].token_ids.tolist() == [6]


@pytest.mark.parametrize("options", [{"repetition_penalty": 1.2}, {"presence_penalty": 0.5}])
def test_penalties_wait_for_the_tokens_before(slow_device: type[SlowDevice], options: dict[str, float]) -> None:
    runner, _, _ = make_runner(late=True)
    runner.launch(plan(0, admit(0, [4, 5], 1), admit(1, [8, 9], 10, **options)))
    runner.launch(plan(1, scheduled=[decode(0, 2, 0)]))
    assert slow_device.num_waits == 0
    runner.launch(plan(2, scheduled=[decode(1, 2, 0)]))
    assert slow_device.num_waits == 2  # for both steps before, though only one was its own
    state = runner._slots.state(1)
    assert state.token_ids == [8, 9, 10, UNREAD]


def test_log_probabilities_wait_for_their_own_step(slow_device: type[SlowDevice]) -> None:
    runner, model, _ = make_runner(late=True)
    result = runner.launch(plan(0, admit(0, [4, 5], 1, logprobs=1))).finish()
    assert slow_device.num_waits == 0 and result.all_sampled[0].logprobs is not None
    runner.launch(plan(1, scheduled=[decode(0, 2, 0)]))
    assert model.batches[1].token_ids.tolist() == [6]


def test_tokens_named_by_value_wait_for_the_history(slow_device: type[SlowDevice]) -> None:
    runner, model, _ = make_runner(late=True)
    runner.launch(plan(0, admit(0, [4, 5], 1)))
    runner.launch(plan(1, scheduled=[ScheduledRequest(0, 2, 1, [6], [], True)]))
    assert slow_device.num_waits == 1 and model.batches[1].token_ids.tolist() == [6]


def test_nan_fails_its_request_when_it_is_read(slow_device: type[SlowDevice]) -> None:
    runner, model, _ = make_runner(late=True)
    first = runner.launch(plan(0, admit(0, [1, NAN_TOKEN], 1), admit(1, [1, 2], 10)))
    second = runner.launch(plan(1, scheduled=[decode(0, 2, 0), decode(1, 2, 0)]))
    assert model.batches[1].token_ids.tolist() == [0, 3]
    result = first.finish()
    assert tokens(result) == {1: 3}
    assert [(error.slot, "position 2" in error.message) for error in result.errors] == [(0, True)]
    assert tokens(second.finish())[1] == 4


def test_a_slot_that_holds_another_request_is_not_confused(slow_device: type[SlowDevice]) -> None:
    runner, model, _ = make_runner(late=True)
    first = runner.launch(plan(0, admit(0, [4, 5], 1)))
    new, share = admit(0, [41, 42], 10)
    second = runner.launch(StepPlan(0, 1, [BatchPlan([0], [new], [share])]))
    third = runner.launch(plan(2, scheduled=[decode(0, 2, 1)]))
    assert model.batches[2].token_ids.tolist() == [43]
    slow_device.is_free = True
    assert [tokens(step.finish()) for step in (first, second, third)] == [{0: 6}, {0: 43}, {0: 44}]
    runner.launch(plan(3, scheduled=[decode(0, 3, 2)])).finish()
    assert runner._slots.state(0).token_ids == [41, 42, 43, 44, UNREAD]


def test_a_rank_is_idle_when_the_last_step_is_answered(slow_device: type[SlowDevice]) -> None:
    progress = RankProgress()
    runner, _, _ = make_runner(late=True, progress=progress)

    def operation() -> int:
        return int(progress._words[1]) & 0xFF

    first = runner.launch(plan(0, admit(0, [4, 5], 1)))
    second = runner.launch(plan(1, scheduled=[decode(0, 2, 0)]))
    first.finish()
    assert operation() == Operation.SAMPLE
    second.finish()
    assert operation() == Operation.IDLE


def late_rank(context: RankContext) -> list[Any]:
    """One of two ranks that divide a layer: what it was given to compute, launched before anything was read."""
    late_samples.Copied = SlowDevice  # type: ignore[misc, assignment]
    mesh = init_distributed(ParallelConfig(tp=2), context.rank, context.store, torch.device("cpu"), timeout_s=30.0)
    runner, model, _ = make_runner(late=True, mesh=mesh)
    steps = [runner.launch(plan(0, admit(0, [4, 5], 1), admit(1, [8, 9], 10)))]
    steps.append(runner.launch(plan(1, scheduled=[decode(1, 2, 0), decode(0, 2, 0)])))
    steps.append(runner.launch(plan(2, scheduled=[decode(0, 3, 1)])))
    num_waits = SlowDevice.num_waits
    return [[batch.token_ids.tolist() for batch in model.batches], num_waits, [tokens(s.finish()) for s in steps]]


def test_ranks_that_divide_a_layer_share_tokens_on_the_device() -> None:
    inputs = [[4, 5, 8, 9], [10, 6], [7]]
    found = run_ranks(late_rank, 2)
    assert found == [[inputs, 0, [{0: 6, 1: 10}, {1: 11, 0: 7}, {0: 8}]], [inputs, 0, [{}, {}, {}]]]


class DelayedDevice:
    """Stands in for the events of a device that is done with a step some milliseconds after its launch."""

    def __init__(self, device: torch.device) -> None:
        self._done = threading.Event()
        timer = threading.Timer(0.004, self._done.set)
        timer.daemon = True
        timer.start()

    def is_done(self) -> bool:
        return self._done.is_set()

    def wait(self) -> None:
        self._done.wait()


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[LateSamples]:
    """Ranks on the CPU read late. Those that were made."""
    made: list[LateSamples] = []

    def make(*arguments: Any) -> LateSamples:
        made.append(LateSamples(*arguments))
        return made[-1]

    monkeypatch.setattr(late_samples, "Copied", DelayedDevice)
    monkeypatch.setattr(rank_startup, "reads_late", lambda *arguments: True)
    monkeypatch.setattr(rank_startup, "LateSamples", make)
    return made


def test_a_served_model_gives_the_same_tokens(late: list[LateSamples], monkeypatch: pytest.MonkeyPatch) -> None:
    found = serve(CASES[0], 2, "cpu")
    found.require(2)
    num_inputs = sum(map(len, found.tokens.values()))
    assert late[0].num_taken > num_inputs // 4
    monkeypatch.setattr(rank_startup, "reads_late", late_samples.reads_late)
    assert difference(found, serve(replace(CASES[0]), 1, "cpu", wants_all_logprobs=True)) < 1e-3


@pytest.mark.full
@pytest.mark.parametrize("depth", [*DEPTHS, 3])
@pytest.mark.parametrize("case", [case for case in CASES if not case.quantization], ids=lambda case: case.name)
def test_every_way_to_serve_gives_the_same_tokens(
    late: list[LateSamples], monkeypatch: pytest.MonkeyPatch, case: Case, depth: int
) -> None:
    found = serve(case, depth, "cpu")
    found.require(depth)
    if case.is_deterministic:
        require_same_alone(found)
    assert depth == 1 or late[0].num_taken > 0
    monkeypatch.setattr(rank_startup, "reads_late", late_samples.reads_late)
    assert difference(found, expected_of(case)) <= case.bound


def test_what_fails_on_the_device_is_told(late: list[LateSamples], monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows when a step is read, in another thread than the one that waits for plans."""

    def fail(self: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(DelayedDevice, "wait", fail)
    with pytest.raises(EngineFailure, match="illegal memory access"):
        serve(CASES[0], 2, "cpu")


@pytest.mark.parametrize(
    ("device", "parallel", "attention", "expected"),
    [
        ("cuda", ParallelConfig(), "auto", True),
        ("cuda", ParallelConfig(tp=4, ep=2), "triton", True),
        ("cpu", ParallelConfig(), "auto", False),
        ("cuda", ParallelConfig(pp=2), "auto", False),
        ("cuda", ParallelConfig(dp=2), "auto", False),
        ("cuda", ParallelConfig(), "flashinfer", False),
    ],
)
def test_who_reads_late(device: str, parallel: ParallelConfig, attention: str, expected: bool) -> None:
    assert late_samples.reads_late(torch.device(device), parallel, attention) is expected
