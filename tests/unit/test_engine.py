"""The engine over simulated ranks: what it takes in, what it refuses, how it ends and how it begins anew."""

from concurrent.futures import Future

import pytest

from cluster.simulate.gang import SimulatedGang, sequential_tokens
from engine.config import CacheConfig, KvGroupConfig, SchedulerConfig
from engine.engine import Engine
from engine.errors import (
    ContextLengthExceeded,
    EngineFailure,
    InvalidRequest,
    Overloaded,
    ProtocolViolation,
    RankFailure,
)
from engine.messages import SampledToken, StepPlan, StepResult
from engine.request import FinishReason, Output, Request, SamplingParams

VOCAB_SIZE = 50
GROUPS = (KvGroupConfig((0,)), KvGroupConfig((1,), chunk_size=8))


def new_gang(
    *, num_blocks: int = 100, depth: int = 1, epoch: int = 0, num_dp_groups: int = 1, max_num_seqs: int = 4
) -> SimulatedGang:
    return SimulatedGang(
        num_slots=max_num_seqs,
        kv_groups=GROUPS,
        block_size=4,
        num_blocks=num_blocks,
        vocab_size=VOCAB_SIZE,
        depth=depth,
        epoch=epoch,
        num_dp_groups=num_dp_groups,
    )


def new_engine(
    gang: SimulatedGang,
    *,
    num_blocks: int = 100,
    num_dp_groups: int = 1,
    max_num_seqs: int = 4,
    max_num_waiting: int = 8,
) -> Engine:
    return Engine(
        executor=gang,
        kv_groups=GROUPS,
        vocab_size=VOCAB_SIZE,
        scheduler_config=SchedulerConfig(max_num_seqs, 16, 64, max_num_waiting, gang.depth),
        cache_config=CacheConfig(block_size=4, num_blocks=num_blocks),
        num_dp_groups=num_dp_groups,
    )


def new_request(
    request_id: str, *, num_prompt_tokens: int = 5, num_generated: int = 0, max_tokens: int = 6, **sampling: object
) -> Request:
    params = SamplingParams(max_tokens, **sampling)  # type: ignore[arg-type]
    return Request(request_id, list(range(num_prompt_tokens + num_generated)), num_prompt_tokens, params)


def run(engine: Engine, most_steps: int = 100) -> dict[str, list[Output]]:
    outputs: dict[str, list[Output]] = {}
    for _ in range(most_steps):
        if not engine.has_work:
            return outputs
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
        engine.check_integrity()
    raise AssertionError(f"work is left after {most_steps} steps")


def tokens(outputs: list[Output]) -> list[int]:
    assert [output.finish_reason is not None for output in outputs] == [False] * (len(outputs) - 1) + [True]
    return [token_id for output in outputs for token_id in output.token_ids]


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_tokens_are_those_of_a_request_that_runs_alone(depth: int) -> None:
    engine = new_engine(new_gang(depth=depth))
    requests = [new_request(f"r{seed}", num_prompt_tokens=3 + 7 * seed, seed=seed) for seed in range(6)]
    for request in requests:
        engine.add(request)
    outputs = run(engine)
    for request in requests:
        expected = sequential_tokens(
            request.sampling, request.token_ids, request.num_prompt_tokens, vocab_size=VOCAB_SIZE
        )
        assert tokens(outputs[request.request_id]) == expected
        assert outputs[request.request_id][-1].finish_reason == FinishReason.LENGTH


def test_a_resumed_request_goes_on_where_it_was() -> None:
    engine = new_engine(new_gang())
    engine.add(new_request("whole", max_tokens=6))
    whole = tokens(run(engine)["whole"])
    request = new_request("resumed", max_tokens=6)
    engine.add(Request("resumed", request.token_ids + whole[:4], request.num_prompt_tokens, request.sampling))
    assert tokens(run(engine)["resumed"]) == whole[4:]


def test_choices_of_one_request_differ_by_their_choice() -> None:
    engine = new_engine(new_gang())
    for choice in range(3):
        engine.add(new_request(f"r-{choice}", seed=1, choice=choice, max_tokens=8))
    outputs = run(engine)
    assert len({tuple(tokens(outputs[f"r-{choice}"])) for choice in range(3)}) == 3


def test_dp_groups_share_the_load_and_idle_ones_get_empty_batches() -> None:
    gang = new_gang(num_dp_groups=2)
    engine = new_engine(gang, num_dp_groups=2)
    engine.add(new_request("long", max_tokens=9))
    engine.add(new_request("short", max_tokens=2))
    assert set(run(engine)) == {"long", "short"}
    assert all(len(plan.batches) == 2 for plan in gang.plans)
    assert [len(plan.batches[1].sampling_slots) for plan in gang.plans] == [1, 1] + [0] * 7


@pytest.mark.parametrize(
    ("request_", "error", "param"),
    [
        (new_request("r", num_prompt_tokens=0), InvalidRequest, "prompt"),
        (Request("r", [1], 2, SamplingParams(4)), InvalidRequest, "prompt"),
        (Request("r", [1, VOCAB_SIZE], 2, SamplingParams(4)), InvalidRequest, "prompt"),
        (Request("r", [-1], 1, SamplingParams(4)), InvalidRequest, "prompt"),
        (new_request("r", max_tokens=0), InvalidRequest, "max_tokens"),
        (new_request("r", temperature=-1.0), InvalidRequest, "temperature"),
        (new_request("r", num_generated=6, max_tokens=6), InvalidRequest, "max_tokens"),
        (new_request("live"), InvalidRequest, "request_id"),
        (new_request("r", num_prompt_tokens=40, max_tokens=25), ContextLengthExceeded, "max_tokens"),
    ],
)
def test_bad_requests_are_refused(request_: Request, error: type[InvalidRequest], param: str) -> None:
    engine = new_engine(new_gang())
    engine.add(new_request("live"))
    with pytest.raises(error) as raised:
        engine.add(request_)
    assert raised.value.param == param
    assert set(run(engine)) == {"live"}


def test_what_the_cache_can_never_hold_is_refused_and_what_just_fits_is_served() -> None:
    # 40 tokens, the last never computed: 10 blocks in the full group, 2 in the chunked one.
    engine = new_engine(new_gang(num_blocks=13), num_blocks=13)
    with pytest.raises(ContextLengthExceeded, match="12 KV blocks"):
        engine.add(new_request("r", num_prompt_tokens=30, max_tokens=12))
    engine.add(new_request("r", num_prompt_tokens=30, max_tokens=11))
    assert len(tokens(run(engine)["r"])) == 11


def test_a_full_queue_is_an_overload() -> None:
    engine = new_engine(new_gang(), max_num_waiting=2)
    engine.add(new_request("r0"))
    engine.add(new_request("r1"))
    with pytest.raises(Overloaded, match="at most 2"):
        engine.add(new_request("r2"))
    engine.step()
    engine.add(new_request("r2"))
    assert set(run(engine)) == {"r0", "r1", "r2"}


@pytest.mark.parametrize("depth", [1, 2])
def test_an_aborted_request_does_no_more_work_after_the_plans_in_flight(depth: int) -> None:
    gang = new_gang(depth=depth)
    engine = new_engine(gang)
    engine.add(new_request("r", max_tokens=50))
    for _ in range(5):
        engine.step()
    num_plans = len(gang.plans)
    assert engine.abort("r")
    assert not engine.abort("r")
    outputs = run(engine)
    assert outputs["r"] == [Output("r", [], FinishReason.ABORT)]
    assert len(gang.plans) == num_plans, "no plan is made after the abort"
    assert engine.stats().num_blocks_used == 0


def test_abort_of_a_waiting_request() -> None:
    engine = new_engine(new_gang(max_num_seqs=1), max_num_seqs=1)
    engine.add(new_request("runs"))
    engine.add(new_request("waits"))
    engine.step()
    assert engine.abort("waits")
    outputs = run(engine)
    assert [output.finish_reason for output in outputs["waits"]] == [FinishReason.ABORT]
    assert len(tokens(outputs["runs"])) + 1 == 6  # the first step's token was taken above


def test_an_id_is_free_again_after_the_end() -> None:
    engine = new_engine(new_gang())
    engine.add(new_request("r"))
    first = tokens(run(engine)["r"])
    engine.add(new_request("r"))
    assert tokens(run(engine)["r"]) == first


def test_preempted_requests_go_before_later_ones() -> None:
    gang = new_gang(num_blocks=13, max_num_seqs=2)
    engine = new_engine(gang, num_blocks=13, max_num_seqs=2)
    for request_id in ("r0", "r1", "r2"):
        engine.add(new_request(request_id, num_prompt_tokens=6, max_tokens=20))
    ends = []
    while engine.has_work:
        ends += [output.request_id for output in engine.step() if output.finish_reason is not None]
    assert engine.stats().num_preemptions > 0
    assert ends == ["r0", "r1", "r2"]


def test_a_failed_gang_and_its_successor() -> None:
    gang = new_gang(depth=2)
    engine = new_engine(gang)
    engine.add(new_request("r", max_tokens=10))
    before = [output for _ in range(3) for output in engine.step()]
    gang.close()
    with pytest.raises(RankFailure):
        engine.step()
    with pytest.raises(EngineFailure, match="reset"):
        engine.step()
    successor = new_gang(depth=2, epoch=1)
    engine.reset(1, executor=successor)
    engine.add(new_request("new"))
    outputs = run(engine)
    assert tokens(before + outputs["r"]) == sequential_tokens(SamplingParams(10), range(5), 5, VOCAB_SIZE)
    assert len(tokens(outputs["new"])) == 6
    assert {(plan.epoch, plan.step) for plan in successor.plans} == {(1, step) for step in range(len(successor.plans))}
    assert engine.stats().num_steps == len(gang.plans) + len(successor.plans)


def test_a_smaller_cache_after_a_reset_ends_what_no_longer_fits() -> None:
    engine = new_engine(new_gang())
    engine.add(new_request("big", num_prompt_tokens=50, max_tokens=14))
    engine.add(new_request("small"))
    engine.step()
    engine.reset(1, executor=new_gang(epoch=1, num_blocks=10), cache_config=CacheConfig(block_size=4, num_blocks=10))
    outputs = run(engine)
    assert (outputs["big"][-1].finish_reason, outputs["big"][-1].error) == (
        FinishReason.ERROR,
        "the cache has shrunk to 9 KV blocks, too few for this request",
    )
    assert outputs["small"][-1].finish_reason == FinishReason.LENGTH


class WrongExecutor:
    """Answers with a result of another epoch, of another step, or of too few dp groups."""

    def __init__(self, results: list[StepResult]) -> None:
        self.results = results

    def prepare(self, plan: StepPlan) -> None: ...

    def submit(self, plan: StepPlan) -> Future[list[StepResult]]:
        future: Future[list[StepResult]] = Future()
        future.set_result(self.results)
        return future

    def close(self) -> None: ...


@pytest.mark.parametrize(
    "results",
    [
        [],
        [StepResult(0, 0, 0, [SampledToken(0, 1)])],
        [StepResult(1, 1, 0, [SampledToken(0, 1)])],
        [StepResult(1, 0, 0, [SampledToken(0, 1)])] * 2,
    ],
    ids=["none", "old epoch", "other step", "two dp groups"],
)
def test_answers_of_other_steps_are_refused(results: list[StepResult]) -> None:
    engine = Engine(
        executor=WrongExecutor(results),
        kv_groups=GROUPS,
        vocab_size=VOCAB_SIZE,
        scheduler_config=SchedulerConfig(),
        cache_config=CacheConfig(num_blocks=20),
        epoch=1,
    )
    engine.add(new_request("r"))
    with pytest.raises(ProtocolViolation, match="epoch 1, step 0 was answered by"):
        engine.step()


def test_stats() -> None:
    engine = new_engine(new_gang(max_num_seqs=1), max_num_seqs=1)
    assert engine.stats().kv_usage == 0.0 and not engine.has_work
    engine.add(new_request("r0"))
    engine.add(new_request("r1"))
    assert (engine.stats().num_running, engine.stats().num_waiting) == (0, 2)
    engine.step()
    stats = engine.stats()
    # The second plan is on its way.
    assert (stats.num_running, stats.num_waiting, stats.num_in_flight, stats.num_steps) == (1, 1, 1, 2)
    assert stats.kv_usage == 4 / 99  # 5 tokens: two blocks in each of two groups
