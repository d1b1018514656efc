"""A request through the real command, in the trace that its gateway began: what leader and ranks did is there too."""

import secrets

import httpx

from tests.support.otlp_receiver import OtlpReceiver, tree
from tests.support.served import Served


def test_a_served_request_shows_where_its_time_went(served: Served, collector: OtlpReceiver) -> None:
    trace_id, gateway = secrets.token_hex(16), secrets.token_hex(8)
    (replica,) = served.status()["replicas"]
    name = replica["id"]
    body = {"messages": [{"role": "user", "content": "My name is Zora."}], "max_tokens": 30, "ignore_eos": True}
    headers = {"traceparent": f"00-{trace_id}-{gateway}-01", "x-request-id": "gateway-7"}
    response = httpx.post(f"{served.url}/v1/chat/completions", json=body, headers=headers, timeout=60)
    assert response.status_code == 200 and response.headers["x-request-id"] == "gateway-7"
    of_call = ["admission", "tokenize", "token budget", "route", f"attempt {name}"]
    of_sequence = ["queue", "prefill", "decode"]
    root, call, sequence = "POST /v1/chat/completions", "chat remuda-tiny", f"sequence {name}"
    spans = collector.trace(trace_id, [root, call, *of_call, sequence, *of_sequence])
    assert tree(spans) == {
        root: "",
        call: root,
        **dict.fromkeys(of_call, call),
        sequence: f"attempt {name}",
        **dict.fromkeys(of_sequence, sequence),
    }
    found = {span.name: span for span in spans}
    assert found[root].parent == gateway
    assert {span.service for span in spans if span.name in (sequence, *of_sequence)} == {"remuda-leader"}
    # One host, so one clock: what the leader did lies within what the front end waited for.
    assert found[f"attempt {name}"].start_ns <= found[sequence].start_ns
    assert sum(found[phase].seconds for phase in of_sequence) <= found[root].seconds
    steps = found["decode"].attributes
    assert 29 <= steps["remuda.num_steps"] <= 31  # of a token each, but for the first
    assert len(steps["remuda.rank_step_ms"]) == 2 and steps["remuda.slowest_rank"] in (0, 1)
    assert 0 < max(steps["remuda.rank_step_ms"]) <= 1.5 * steps["remuda.step_ms"]
    assert found["prefill"].attributes["remuda.num_steps"] >= 1
