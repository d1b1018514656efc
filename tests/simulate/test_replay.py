"""Flight records replay exactly, and whoever changes one is found out."""

import json
import random
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.cli.main import app
from cluster.errors import mapping_of
from cluster.replica.recorded_engine import RecordedEngine
from cluster.replica.recovery import MAX_REPAIRS
from cluster.simulate.gang import SimulatedGang
from cluster.simulate.replay import CannotReplay, Differs, Recorded, Replay
from engine.config import CacheConfig, KvGroupConfig, SchedulerConfig
from engine.errors import EngineFailure
from engine.executor.flight_record import FlightRecord
from engine.messages import StepPlan, StepResult, encode
from engine.request import Request, SamplingParams

VOCAB_SIZE = 31
_GROUPS = (KvGroupConfig((0,)), KvGroupConfig((1,), window_size=6))


class _RecordedGang(SimulatedGang):
    """Notes what the channel's executor would: each dp group's result comes from a rank of its own."""

    record: FlightRecord

    def submit(self, plan: StepPlan) -> "Future[list[StepResult]]":
        self.record.plan(time.monotonic(), encode(plan))
        future = super().submit(plan)
        take = future.result

        def taken(timeout: float | None = None) -> list[StepResult]:
            results = take(timeout)
            for rank, result in enumerate(results):
                self.record.answer(time.monotonic(), rank, encode(result))
            return results

        future.result = taken  # type: ignore[method-assign]
        return future


def _gang(
    record: FlightRecord, epoch: int, depth: int, num_dp_groups: int, dies_at: set[tuple[int, int]] | None = None
) -> _RecordedGang:
    gang = _RecordedGang(
        num_slots=4,
        kv_groups=_GROUPS,
        block_size=4,
        num_blocks=24,
        vocab_size=VOCAB_SIZE,
        depth=depth,
        epoch=epoch,
        num_dp_groups=num_dp_groups,
        dies_at=dies_at,
    )
    gang.record = record
    record.event("epoch", epoch=epoch, num_blocks=24)
    return gang


def _request(chance: random.Random, name: str) -> Request:
    num_tokens = chance.randint(1, 20)
    prompt = [(position * 3 + chance.randrange(2)) % VOCAB_SIZE for position in range(num_tokens)]
    return Request(name, prompt, num_tokens, SamplingParams(chance.randint(1, 12), seed=chance.randrange(99)))


def _record(seed: int, depth: int = 1, num_dp_groups: int = 1, max_bytes: int = 2**24) -> bytes:
    """Of a load that comes between steps and within them, with aborts, and a gang that breaks once."""
    chance = random.Random(seed)
    record = FlightRecord(max_bytes)
    record.describe(num_ranks=num_dp_groups, sampling_ranks=list(range(num_dp_groups)))
    gang = _gang(record, 0, depth, num_dp_groups)
    engine = RecordedEngine(
        record,
        executor=gang,
        kv_groups=_GROUPS,
        vocab_size=VOCAB_SIZE,
        scheduler_config=SchedulerConfig(4, 16, 32, depth=depth),
        cache_config=CacheConfig(4, 24),
        num_dp_groups=num_dp_groups,
    )
    names = iter(f"q{number}" for number in range(10**6))

    def come() -> None:
        for _ in range(chance.choice([0, 0, 0, 1, 2])):
            engine.add(_request(chance, next(names)))
        if chance.random() < 0.05 and engine._states:
            engine.abort(chance.choice(sorted(engine._states)))

    for turn in range(120):
        come()
        if turn == 60:
            gang.close()
        try:
            if engine.has_work:
                engine.step(come)
        except EngineFailure as error:
            record.event("failure", epoch=0, rank=None, error=str(error))
            gang = _gang(record, 1, depth, num_dp_groups)
            engine.reset(1, executor=gang, cache_config=CacheConfig(4, 20))
    return b"".join(record.lines())


@pytest.mark.parametrize("num_dp_groups", [1, 2])
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_a_record_replays_exactly(seed: int, depth: int, num_dp_groups: int) -> None:
    recorded = Recorded(_record(seed, depth, num_dp_groups))
    replay = Replay(recorded)
    replay.run()
    assert list(recorded.epochs) == [0, 1]
    assert replay.num_steps == sum(len(epoch.steps) for epoch in recorded.epochs.values()) > 60
    assert replay.num_tokens > 60


def _lines(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.splitlines()]


def _difference(lines: list[dict[str, Any]]) -> Differs:
    with pytest.raises(Differs) as found:
        Replay(Recorded(b"\n".join(json.dumps(line).encode() for line in lines))).run()
    return found.value


@pytest.mark.parametrize("kind", ["request", "plan", "abort"])
def test_what_is_missing_is_found_out(kind: str) -> None:
    lines = _lines(_record(5))
    found = [line for line in lines if line["kind"] == kind]
    lines.remove(found[len(found) // 3])
    assert _difference(lines).line > 0


def test_an_altered_result_is_found_out() -> None:
    """A rank that says that it got no token: the request goes on otherwise, from the next plan on."""
    lines = _lines(_record(6))
    number, answer = [(i, line) for i, line in enumerate(lines) if line["kind"] == "answer" and line["message"][11:]][9]
    answer["message"][11] = answer["message"][12] = ""
    assert number < _difference(lines).line < number + 20


def _record_of_deadly_requests(num_deadly: int) -> tuple[bytes, int]:
    """One after the other, each beside harmless ones. Also returns how often the gang broke."""
    chance, record, num_breaks = random.Random(1), FlightRecord(), 0
    dies_at = {(1000 + number, 6) for number in range(num_deadly)}
    record.describe(num_ranks=1, sampling_ranks=[0])
    engine = RecordedEngine(
        record,
        executor=_gang(record, 0, 1, 1, dies_at),
        kv_groups=_GROUPS,
        vocab_size=VOCAB_SIZE,
        scheduler_config=SchedulerConfig(4, 16, 32),
        cache_config=CacheConfig(4, 24),
    )
    for number in range(num_deadly):
        engine.add(Request(f"deadly{number}", [number + 1] * 3, 3, SamplingParams(12, seed=1000 + number)))
        for index in range(2):
            engine.add(_request(chance, f"harmless{number}.{index}"))
        while engine.has_work:
            try:
                engine.step()
            except EngineFailure as error:
                record.event("failure", epoch=num_breaks, rank=0, error=str(error))
                num_breaks += 1
                gang = _gang(record, num_breaks, 1, 1, dies_at)
                engine.reset(num_breaks, executor=gang, cache_config=CacheConfig(4, 24))
    return b"".join(record.lines()), num_breaks


def test_breaks_that_were_the_doing_of_requests_are_no_difference() -> None:
    data, num_breaks = _record_of_deadly_requests(4)
    assert num_breaks > MAX_REPAIRS + 1
    Replay(Recorded(data)).run()
    told = [line for line in _lines(data) if line["kind"] != "explained"]
    assert "given up" in str(_difference(told))


def _damaged(lines: list[dict[str, Any]]) -> dict[str, bytes]:
    """By what was done to it."""

    def first(kind: str) -> int:
        return next(number for number, line in enumerate(lines) if line["kind"] == kind)

    def changed(number: int, **fields: Any) -> bytes:
        news = {key: value for key, value in (lines[number] | fields).items() if value is not ...}
        return b"\n".join(json.dumps(news if at == number else line).encode() for at, line in enumerate(lines))

    whole = changed(0)
    request = lines[first("request")]["request"]
    return {
        "cut off": whole[:-9],
        "no object": whole + b"\nnull",
        "not UTF-8": whole + b'\n"\xff"',
        "head without an engine's option": changed(0, engine={"vocab_size": 3}),
        "head with another number of ranks": changed(0, sampling_ranks=[3]),
        "head without ranks": changed(0, num_ranks=...),
        "line without a kind": changed(first("epoch"), kind=...),
        "line without a time": changed(first("epoch"), at_s=...),
        "plan of one part": changed(first("plan"), message=["plan"]),
        "plan that is none": changed(first("plan"), message={"epoch": 0}),
        "answer of nothing": changed(first("answer"), message=[]),
        "answer of one part": changed(first("answer"), message=["result"]),
        "answer of nobody": changed(first("answer"), rank=...),
        "request without its tokens": changed(first("request"), request={**request, "token_ids": None}),
        "request of no turn": changed(first("request"), turn=...),
        "request of a strange turn": changed(first("request"), turn="one"),
        "abort of nothing": changed(first("abort"), request_id=...),
        "failure of no epoch": changed(first("failure"), epoch="x"),
        "reset without its cache": changed(first("reset"), cache_config=...),
    }


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    file, runner = tmp_path / "record", CliRunner()
    lines = _lines(_record(5))
    for damage, data in _damaged(lines).items():
        file.write_bytes(data)
        refused = runner.invoke(app, ["replay", str(file)]).exception
        assert isinstance(refused, CannotReplay), f"{damage}: {refused!r}"
        assert mapping_of(refused).exit_code == 2


def test_what_does_not_reach_back_is_refused() -> None:
    with pytest.raises(CannotReplay, match="does not reach back"):
        Recorded(_record(7, max_bytes=20_000))
    with pytest.raises(CannotReplay, match="no flight record"):
        Recorded(b"hello\n")


def test_the_command_says_which_it_is(tmp_path: Path) -> None:
    whole, lost, changed = (tmp_path / name for name in ("whole", "lost", "changed"))
    whole.write_bytes(_record(8))
    lost.write_bytes(_record(8, max_bytes=20_000))
    lines = _lines(_record(8))
    lines.remove(next(line for line in lines if line["kind"] == "request"))
    changed.write_text("\n".join(map(json.dumps, lines)))
    answers = [CliRunner().invoke(app, ["replay", str(file)]) for file in (whole, changed)]
    assert [answer.exit_code for answer in answers] == [0, 1]
    assert "replay exactly" in answers[0].stdout and " differs: " in answers[1].stdout
    refused = CliRunner().invoke(app, ["replay", str(lost)]).exception
    assert refused is not None and mapping_of(refused).exit_code == 2
