"""Where a request's time went, as a collector sees it: one trace from the client's own span to the replica's steps."""

import asyncio
import json
import secrets
import threading
from collections.abc import Iterator

import pytest
from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from cluster.frontend.call_trace import CallTrace
from cluster.frontend.calls import Call, SamplingOptions, TextPrompt
from cluster.rpc.generated.remuda.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from tests.support.leader_bed import until
from tests.support.otlp_receiver import OtlpReceiver, ReceivedSpan, tree
from tests.telemetry.bed import site

CHAT = {"messages": [{"role": "user", "content": "Zora keeps a secret"}], "max_tokens": 20, "ignore_eos": True}
OF_CALL = {"admission": "chat m", "tokenize": "chat m", "token budget": "chat m", "route": "chat m"}
OF_SEQUENCE = {"queue": "sequence r0", "prefill": "sequence r0", "decode": "sequence r0"}
ALL = ["POST /v1/chat/completions", "chat m", *OF_CALL, "attempt r0", "sequence r0", *OF_SEQUENCE]


@pytest.fixture(scope="module")
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as started:
        yield started


class Caller:
    """A span of a client's, or a gateway's."""

    def __init__(self, is_sampled: bool = True) -> None:
        self.trace_id, self.span_id = secrets.token_hex(16), secrets.token_hex(8)
        self.headers = {"traceparent": f"00-{self.trace_id}-{self.span_id}-0{int(is_sampled)}"}


def named(spans: list[ReceivedSpan], name: str) -> ReceivedSpan:
    (found,) = [span for span in spans if span.name == name]
    return found


async def test_one_request_is_one_trace(receiver: OtlpReceiver) -> None:
    caller = Caller()
    async with site(receiver.endpoint, "r0") as one:
        headers = {**caller.headers, "x-request-id": "of-the-gateway"}
        response = await one.served.http.post("/v1/chat/completions", json=CHAT, headers=headers)
        assert response.status_code == 200
        answer = response.json()
        spans = await asyncio.to_thread(receiver.trace, caller.trace_id, ALL)
    assert tree(spans) == {
        "POST /v1/chat/completions": "",
        "chat m": "POST /v1/chat/completions",
        **OF_CALL,
        "attempt r0": "chat m",
        "sequence r0": "attempt r0",
        **OF_SEQUENCE,
    }
    root, call = named(spans, "POST /v1/chat/completions"), named(spans, "chat m")
    assert (root.parent, root.kind, root.service) == (caller.span_id, "SERVER", "remuda-frontend")
    assert root.attributes["http.response.status_code"] == 200
    assert root.attributes["remuda.request_id"] == "of-the-gateway"
    assert call.attributes["gen_ai.operation.name"] == "chat" and call.attributes["gen_ai.request.model"] == "m"
    assert call.attributes["gen_ai.usage.input_tokens"] == answer["usage"]["prompt_tokens"]
    assert call.attributes["gen_ai.usage.output_tokens"] == 20
    assert call.attributes["gen_ai.response.finish_reasons"] == ["length"]
    assert call.attributes["gen_ai.response.id"] == answer["id"]
    assert not any(span.is_error for span in spans)
    attempt, sequence = named(spans, "attempt r0"), named(spans, "sequence r0")
    assert (attempt.kind, sequence.kind, sequence.service) == ("CLIENT", "SERVER", "remuda-leader")
    assert attempt.attributes["remuda.num_tokens"] == 20
    phases = [named(spans, name) for name in ("queue", "prefill", "decode")]
    assert phases[0].attributes["remuda.num_steps"] == 0
    ends = [sequence.start_ns, *(phase.end_ns for phase in phases)]
    assert [phase.start_ns for phase in phases] == ends[:-1] and ends[-1] == sequence.end_ns
    assert 0 < call.attributes["remuda.time_to_first_token_s"] < call.seconds < root.seconds
    shown = json.dumps([[span.name, span.attributes, span.events] for span in spans])
    assert "Zora" not in shown and "secret" not in shown


async def test_over_grpc_too(receiver: OtlpReceiver) -> None:
    caller = Caller()
    async with site(receiver.endpoint, "r0") as one:
        stub = inference_pb2_grpc.InferenceStub(one.served.channel)
        request = inference_pb2.GenerateRequest(text="Hello", sampling=common_pb2.SamplingParams(max_tokens=3))
        async for _ in stub.Generate(request, metadata=tuple(caller.headers.items())):
            pass
        spans = await asyncio.to_thread(
            receiver.trace, caller.trace_id, ["remuda.v1.Inference/Generate", "sequence r0", "decode"]
        )
    parents = tree(spans)
    assert named(spans, "remuda.v1.Inference/Generate").parent == caller.span_id
    assert parents["text_completion m"] == "remuda.v1.Inference/Generate"
    assert parents["attempt r0"] == "text_completion m" and parents["sequence r0"] == "attempt r0"


async def test_a_failover_is_in_the_trace(receiver: OtlpReceiver) -> None:
    caller = Caller()
    body = {"prompt": [5, 6, 7], "max_tokens": 40, "seed": 11, "ignore_eos": True}
    async with site(receiver.endpoint) as one:
        await one.add("r0", dies_at={(11, 20)})
        asked = asyncio.create_task(one.served.http.post("/v1/completions", json=body, headers=caller.headers))
        await one.add("r1")
        response = await asked
        assert response.status_code == 200 and response.json()["usage"]["completion_tokens"] == 40
        names = ["text_completion m", "attempt r0", "attempt r1", "sequence r1", "decode"]
        spans = await asyncio.to_thread(receiver.trace, caller.trace_id, names)
    lost, resumed = named(spans, "attempt r0"), named(spans, "attempt r1")
    call = named(spans, "text_completion m")
    assert lost.parent == resumed.parent == call.span_id and not call.is_error
    assert lost.is_error and not resumed.is_error
    ((event, seen),) = lost.events
    assert event == "lost" and 0 < seen["remuda.num_tokens"] < 40
    assert resumed.links == [(caller.trace_id, lost.span_id)]
    assert resumed.attributes["remuda.num_tokens_before"] == seen["remuda.num_tokens"]
    assert resumed.attributes["remuda.attempt"] == 1
    assert named(spans, "sequence r1").parent == resumed.span_id
    assert len([span for span in spans if span.name == "route"]) == 2


async def test_one_that_comes_back_links_to_where_it_began(receiver: OtlpReceiver) -> None:
    first, second = Caller(), Caller()
    body = {"prompt": [5, 6, 7], "max_tokens": 100, "ignore_eos": True, "stream": True}
    async with site(receiver.endpoint, "r0") as one:
        headers = {**first.headers, "remuda-resumable": "1"}
        async with one.served.http.stream("POST", "/v1/completions", json=body, headers=headers) as response:
            lines = response.aiter_lines()
            last_id = ""
            while not last_id:
                line = await anext(lines)
                last_id = line.removeprefix("id: ") if line.startswith("id: ") else ""
        headers = {**second.headers, "last-event-id": last_id}
        rest = await one.served.http.post("/v1/completions", content=b"", headers=headers)
        assert rest.text.endswith("data: [DONE]\n\n")
        began = await asyncio.to_thread(receiver.trace, first.trace_id, ["text_completion m"])
        went_on = await asyncio.to_thread(receiver.trace, second.trace_id, ["text_completion m", "attempt r0"])
    assert named(went_on, "text_completion m").links == [(first.trace_id, named(began, "text_completion m").span_id)]


async def test_of_many_sequences_some_are_shown(receiver: OtlpReceiver) -> None:
    caller = Caller()
    async with site(receiver.endpoint, "r0") as one:
        response = await one.served.http.post("/v1/chat/completions", json={**CHAT, "n": 12}, headers=caller.headers)
        assert len(response.json()["choices"]) == 12
        names = ["POST /v1/chat/completions", *["decode"] * 8]
        spans = await asyncio.to_thread(receiver.trace, caller.trace_id, names)
    assert len([span for span in spans if span.name == "decode"]) == 8
    assert named(spans, "chat m").attributes["remuda.num_sequences"] == 12


async def test_who_goes_away_is_in_the_trace(receiver: OtlpReceiver) -> None:
    caller = Caller()
    body = {**CHAT, "max_tokens": 500, "stream": True}
    may_go_on = threading.Event()
    async with site(receiver.endpoint) as one:
        leader = await one.add("r0", may_go_on=may_go_on)
        stream = one.served.http.stream("POST", "/v1/chat/completions", json=body, headers=caller.headers)
        async with stream as response:
            async for line in response.aiter_lines():
                if '"content"' in line:
                    break
        await until(lambda: not leader.num_live_requests)
        may_go_on.set()
        spans = await asyncio.to_thread(receiver.trace, caller.trace_id, ALL)
    assert named(spans, "chat m").attributes["remuda.outcome"] == "cancelled"
    assert named(spans, "sequence r0").attributes["remuda.finish_reason"] == "abort"


async def test_refusals_are_traced_and_nobody_elses_decision_is_overruled(receiver: OtlpReceiver) -> None:
    refused, unsampled, probing = Caller(), Caller(is_sampled=False), Caller()
    async with site(receiver.endpoint, "r0") as one:
        http = one.served.http
        assert (await http.get("/readyz", headers=probing.headers)).status_code == 200
        for path in ("/metrics", "/v1/status"):
            assert (await http.get(path, headers=probing.headers)).status_code == 200
        assert (await http.post("/v1/chat/completions", json=CHAT, headers=unsampled.headers)).status_code == 200
        bad = {**CHAT, "model": "no such model"}
        assert (await http.post("/v1/chat/completions", json=bad, headers=refused.headers)).status_code == 404
        spans = await asyncio.to_thread(receiver.trace, refused.trace_id, ["POST /v1/chat/completions", "chat"])
    # Span names are few: what a client made up is no part of them.
    assert named(spans, "chat").attributes["error.type"] == "ModelNotFound"
    assert named(spans, "chat").attributes["gen_ai.request.model"] == "no such model"
    # Everything is flushed by now.
    assert receiver.trace(unsampled.trace_id, []) == receiver.trace(probing.trace_id, []) == []


async def test_without_a_collector_there_are_no_spans_and_the_context_still_reaches_the_leader() -> None:
    """So that a leader that has a collector can trace behind a front end that has none."""
    caller = Caller()
    async with site(None, "r0") as one:
        traces: list[str] = []
        generate = one.fleet.generate
        one.served.front_end.service.backend.generate = lambda request, *rest: (  # type: ignore[method-assign]
            traces.append(request.trace),
            generate(request, *rest),
        )[1]
        assert (await one.served.http.post("/v1/chat/completions", json=CHAT)).status_code == 200
        response = await one.served.http.post("/v1/chat/completions", json=CHAT, headers=caller.headers)
        assert response.status_code == 200
    assert traces == ["", caller.headers["traceparent"]]


def test_numbers_that_traces_do_not_know_are_left_out() -> None:
    """A client may ask for them; an exporter would lose them with a trace of its own in the log."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    options = SamplingOptions(max_tokens=2**63, seed=-(2**63) - 1, temperature=0.5)
    call = Call("a", [TextPrompt("Hi")], options=options, n=2)
    CallTrace(provider.get_tracer("test"), call, "m", Context())._span.end()
    (span,) = exporter.get_finished_spans()
    told = dict(span.attributes or {})
    assert told["gen_ai.request.temperature"] == 0.5 and told["gen_ai.request.choice.count"] == 2
    assert not {"gen_ai.request.max_tokens", "gen_ai.request.seed"} & told.keys()
