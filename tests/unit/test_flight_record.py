"""The flight record: bounded, readable, and enough to know what a request that still lives began with."""

import base64
import json

import msgspec

from engine.executor.flight_record import FlightRecord, parts
from engine.messages import BatchPlan, StepPlan, StepResult, encode
from engine.packed import pack
from engine.request import Request, SamplingParams


def plan(step: int) -> StepPlan:
    return StepPlan(0, step, [BatchPlan([], [], [], decodes=pack(range(50)))])


def request(name: str) -> Request:
    return Request(name, [1, 2, 3], 3, SamplingParams(max_tokens=9))


def lines(record: FlightRecord) -> list[dict[str, object]]:
    data = b"".join(parts(record.lines()))
    return [json.loads(line) for line in data.splitlines()]


def test_what_crossed_the_channel_can_be_read_back() -> None:
    record = FlightRecord()
    record.describe(replica="r7")
    result = StepResult(0, 3, 1, slots=pack([4]), token_ids=pack([99]), duration_us=12)
    record.request(request("a"))
    record.plan(1.5, encode(plan(3)))
    record.answer(1.75, 1, encode(result))
    record.event("verdict", rank=1, reason="stopped", is_final=True)
    head, asked, sent, answered, verdict = lines(record)
    assert (head["kind"], head["format"], head["replica"]) == ("head", 1, "r7")
    assert msgspec.convert(asked["request"], Request) == request("a")
    assert (sent["at_s"], msgspec.convert(sent["message"], StepPlan)) == (1.5, plan(3))
    assert (answered["rank"], msgspec.convert(answered["message"], StepResult)) == (1, result)
    # As documented, without our own classes.
    assert isinstance(sent["message"], list) and sent["message"][0] == "plan"
    assert base64.b64encode(pack(range(50))).decode() in json.dumps(sent)
    assert verdict.items() >= {"kind": "verdict", "rank": 1, "reason": "stopped", "is_final": True}.items()


def test_it_stays_small_and_keeps_the_requests_that_live() -> None:
    live = {"long"}
    record = FlightRecord(max_bytes=100_000, is_live=lambda name: name in live)
    record.request(request("long"))
    for step in range(5000):
        record.request(request(f"short-{step}"))
        record.plan(float(step), encode(plan(step)))
    found = lines(record)
    steps = [msgspec.convert(line["message"], StepPlan).step for line in found if line["kind"] == "plan"]
    assert steps == list(range(steps[0], 5000)) and 50 < len(steps) < 500
    assert msgspec.convert(found[1]["request"], Request) == request("long"), "it came before all that is kept"
    live.clear()
    assert all("long" not in json.dumps(line) for line in lines(record))


def test_requests_stay_as_long_as_a_state_that_has_them() -> None:
    record = FlightRecord(max_bytes=100_000)
    assert not record.wants_state
    record.request(request("ended"), arrival=0)
    while not record.wants_state:
        record.plan(0.0, encode(plan(0)))
    record.state({"turn": 1}, [0])
    assert not record.wants_state
    states: list[object] = []
    while (found := lines(record))[0]["num_lost"] == 0 or any(line["kind"] == "state" for line in found):
        has_request = any(line["kind"] == "request" for line in found)
        assert has_request, "a state that is left has it"
        states.append(found[0]["num_lost"])
        for step in range(50):
            record.plan(0.0, encode(plan(step)))
    assert len(states) > 5 and states[-1], "the request was older than all that was left"
    assert not any(line["kind"] == "request" for line in lines(record))


def test_parts_are_bounded_and_lose_nothing() -> None:
    chunks = list(parts(iter([b"x" * 300_000, b"y" * 10, b"z" * 700_000])))
    assert b"".join(chunks) == b"x" * 300_000 + b"y" * 10 + b"z" * 700_000
    assert max(map(len, chunks)) <= 2**18
