"""Flight records replay exactly, and whoever changes one is found out."""

import json
import random
import time
from collections import Counter
from collections.abc import Iterator
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
from cluster.simulate.recorded import CannotReplay, Recorded
from cluster.simulate.replay import Differs, Replay
from engine.config import CacheConfig, KvGroupConfig, LoraConfig, SchedulerConfig
from engine.errors import EngineFailure
from engine.executor.flight_record import FlightRecord
from engine.messages import StepPlan, StepResult, encode
from engine.request import NO_TENANT, Request, SamplingParams, Tenant

VOCAB_SIZE = 31
_FIRST_ADAPTED = 99
"""Seeds from there on are of requests with the adapter."""
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
        adapter_of=dict.fromkeys(range(_FIRST_ADAPTED, 2 * _FIRST_ADAPTED), "/poet"),
    )
    gang.record = record
    record.event("epoch", epoch=epoch, num_blocks=24)
    return gang


def _request(chance: random.Random, name: str, adapter: str = "") -> Request:
    num_tokens = chance.randint(1, 20)
    prompt = [(position * 3 + chance.randrange(2)) % VOCAB_SIZE for position in range(num_tokens)]
    sampling = SamplingParams(
        chance.randint(1, 12),
        seed=chance.randrange(_FIRST_ADAPTED) + (_FIRST_ADAPTED if adapter else 0),
        logit_bias=chance.choice([{}, {7: 1.5}]),
        stop_token_ids=(5,),
        prompt_logprobs=chance.choice([None, None, 0]),
    )
    tenant = chance.choice([NO_TENANT, Tenant("heavy", 2.0), Tenant("late", 1.0, 1)])
    return Request(name, prompt, num_tokens, sampling, adapter=adapter, tenant=tenant)


def _record(seed: int, depth: int = 1, num_dp_groups: int = 1, max_bytes: int = 2**24) -> bytes:
    """Of a load that comes between steps and within them, with aborts, an adapter that comes and goes, and a gang that
    breaks once."""
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
        lora_config=LoraConfig(max_loras=2),
    )
    names = iter(f"q{number}" for number in range(10**6))

    def come() -> None:
        for _ in range(chance.choice([0, 0, 0, 1, 2])):
            adapter = chance.choice(["", *(loaded.name for loaded in engine.adapters)])
            engine.add(_request(chance, next(names), adapter))
        if chance.random() < 0.05 and engine._states:
            engine.abort(chance.choice(sorted(engine._states)))

    for turn in range(120):
        come()
        if turn == 3:
            engine.load_adapter("poet", "/poet")
        if turn == 90:
            engine.unload_adapter("poet")
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


@pytest.mark.parametrize("num_dp_groups", [1, 2])
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize(("seed", "max_bytes"), [(0, 20_000), (1, 60_000), (2, 120_000)])
def test_a_record_that_has_lost_its_beginning_replays_from_its_first_state(
    seed: int, max_bytes: int, depth: int, num_dp_groups: int
) -> None:
    """With what is in flight then, waits, shares its blocks or has an adapter; in the first epoch and in the second."""
    recorded = Recorded(_record(seed, depth, num_dp_groups, max_bytes))
    assert recorded.lines[0]["num_lost"] and recorded.begin is not None and len(recorded.states) > 2
    replay = Replay(recorded)
    replay.run()
    line = recorded.begin[0]
    steps = [step for epoch in recorded.epochs.values() for step in epoch.steps.values() if step.line > line]
    assert replay.num_steps == len(steps) > 3


def _lines(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.splitlines()]


def _joined(lines: list[dict[str, Any]]) -> bytes:
    return b"\n".join(json.dumps(line).encode() for line in lines)


def _difference(lines: list[dict[str, Any]]) -> Differs:
    with pytest.raises(Differs) as found:
        Replay(Recorded(_joined(lines))).run()
    return found.value


@pytest.mark.parametrize("kind", ["request", "plan", "abort"])
def test_what_is_missing_is_found_out(kind: str) -> None:
    lines = _lines(_record(5, max_bytes=2**18))
    assert not lines[0]["num_lost"]
    found = [line for line in lines if line["kind"] == kind]
    lines.remove(found[len(found) // 3])
    assert _difference(lines).line > 0


def test_an_altered_result_is_found_out() -> None:
    """A rank that says that it got no token."""
    lines = _lines(_record(6))
    number, answer = [(i, line) for i, line in enumerate(lines) if line["kind"] == "answer" and line["message"][11:]][9]
    answer["message"][11] = answer["message"][12] = ""
    assert abs(_difference(lines).line - number) < 20


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


def _without_states(data: bytes) -> bytes:
    return b"".join(line for line in data.splitlines(keepends=True) if not line.startswith(b'{"kind":"state"'))


def test_a_state_that_is_not_whole_is_passed_over() -> None:
    """Its plans in flight, or a request of it, have made room."""
    lines = _lines(_record(7, depth=3, max_bytes=60_000))
    first, second = [number for number, line in enumerate(lines) if line["kind"] == "state"][:2]
    in_flight = set(lines[first]["state"]["steps_in_flight"])
    held = set(lines[first]["state"]["scheduling"]["arrivals"]) - set(lines[second]["state"]["scheduling"]["arrivals"])
    kept = [lines[0], *(line for line in lines[1:first] if line["kind"] == "request"), *lines[first:]]
    assert in_flight and not any(line["kind"] == "plan" and line["message"][2] in in_flight for line in kept)
    without_request = [line for line in lines if line.get("arrival") not in held]
    for changed in (kept, without_request):
        recorded = Recorded(_joined(changed))
        assert recorded.begin is not None and changed[recorded.begin[0]] == lines[second]
        if changed is kept:
            Replay(recorded).run()


def _leaves(value: Any) -> Iterator[tuple[Any, Any]]:
    """(Container, key) of each."""
    for key, each in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(each, dict | list) and each:
            yield from _leaves(each)
        else:
            yield value, key


def test_a_damaged_state_is_refused_or_found_out() -> None:
    """Whatever one value of it is changed to. Some changes make no difference, as of whose content nobody asks."""
    data, chance, fates = _record(9, max_bytes=40_000), random.Random(1), Counter[str]()
    for _ in range(60):
        lines = _lines(data)
        state = next(line for line in lines if line["kind"] == "state")["state"]
        container, key = chance.choice(list(_leaves(state)))
        container[key] = chance.choice([None, -1, 3, 10**6, 2**70, "x", [], ["l", [1]], ["o", 0], ["o", 999], {}, 0.5])
        try:
            Replay(Recorded(_joined(lines))).run()
        except (CannotReplay, Differs) as error:
            fates[type(error).__name__] += 1
    assert fates["CannotReplay"] > 10 and fates["Differs"] > 10


def test_what_has_nothing_to_begin_from_is_refused() -> None:
    data = _record(7, max_bytes=40_000)
    Recorded(data)
    with pytest.raises(CannotReplay, match="does not reach back"):
        Recorded(_without_states(data))
    lines = _lines(data)
    lines[0]["engine"]["moves_experts"] = True
    with pytest.raises(CannotReplay, match="moves experts"):
        Recorded(_joined(lines))
    with pytest.raises(CannotReplay, match="no flight record"):
        Recorded(b"hello\n")


def test_the_command_says_which_it_is(tmp_path: Path) -> None:
    whole, lost, changed = (tmp_path / name for name in ("whole", "lost", "changed"))
    whole.write_bytes(_record(8))
    lost.write_bytes(_without_states(_record(8, max_bytes=20_000)))
    lines = _lines(_record(8))
    lines.remove(next(line for line in lines if line["kind"] == "request"))
    changed.write_text("\n".join(map(json.dumps, lines)))
    answers = [CliRunner().invoke(app, ["replay", str(file)]) for file in (whole, changed)]
    assert [answer.exit_code for answer in answers] == [0, 1]
    assert "replay exactly" in answers[0].stdout and " differs: " in answers[1].stdout
    refused = CliRunner().invoke(app, ["replay", str(lost)]).exception
    assert refused is not None and mapping_of(refused).exit_code == 2
