"""The audit log has one line for each request and no other: over HTTP and gRPC, refused or not, clients and admins."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import grpc

from cluster.frontend.grpc_gate import HTTP_STATUS_OF
from cluster.rpc.generated.remuda.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    common_pb2,
    inference_pb2,
    inference_pb2_grpc,
    replica_pb2,
)
from cluster.tenants.audit import Audited, AuditLog, AuditRecord, current_audited
from cluster.tenants.record import UsageRecord
from tests.frontend.bodies import chat, completion
from tests.frontend.scripted import Gate
from tests.tenants.front_ends import bearer, endless, key_of, metadata, with_tenants

INFERENCE, ADMIN = "remuda.v1.Inference", "remuda.v1.Admin"


def lines_of(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def told(line: dict[str, Any]) -> tuple[str, str, int, str]:
    return line["route"], line["tenant"], line["status"], line["outcome"]


async def test_every_http_request_has_its_line(tmp_path: Path) -> None:
    log, key = tmp_path / "audit.jsonl", key_of(tmp_path, "team")
    ops = key_of(tmp_path, "ops", "--scope", "admin")
    async with with_tenants(tmp_path, "{}", audit_log=log) as one:

        async def ask(method: str, path: str, key: str | None, status: int, **request: Any) -> None:
            headers = {"x-request-id": f"gateway-{len(asked)}", **({} if key is None else bearer(key))}
            answer = await one.http.request(method, path, headers=headers, **request)
            assert answer.status_code == status, answer.text
            asked.append(headers["x-request-id"])

        asked: list[str] = []
        await ask("POST", "/v1/chat/completions", key, 200, json=chat(stream=True))
        await ask("POST", "/v1/completions", None, 401, json=completion())
        await ask("POST", "/v1/completions", key[:-1], 401, json=completion())
        await ask("POST", "/v1/completions", key, 400, content=b"{")
        await ask("POST", "/tokenize", key, 200, json={"prompt": "secret words"})
        await ask("POST", "/detokenize", key, 400, json={"tokens": [10**6]})
        await ask("GET", "/nowhere/secret", key, 404)
        await ask("DELETE", "/tokenize", key, 405)
        await ask("GET", "/v1/models/secret", key, 404)
        await ask("GET", "/metrics", key, 403)
        await ask("POST", "/v1/load_lora_adapter", key, 403, json={"lora_name": "x", "lora_path": "x"})
        await ask("POST", "/v1/load_lora_adapter", ops, 400, json={"lora_name": "x", "lora_path": "x"})
        await ask("GET", "/v1/status", ops, 200)
        for path in ("/livez", "/readyz", "/console/"):
            assert (await one.http.get(path)).status_code == 200
    lines = lines_of(log)
    assert [told(line) for line in lines] == [
        ("POST /v1/chat/completions", "team", 200, "completed"),
        *[("POST /v1/completions", "", 401, "Unauthenticated")] * 2,
        ("POST /v1/completions", "team", 400, "InvalidRequest"),
        ("POST /tokenize", "team", 200, "completed"),
        ("POST /detokenize", "team", 400, "InvalidRequest"),
        ("GET other", "team", 404, "refused"),
        ("DELETE /tokenize", "team", 405, "refused"),
        ("GET /v1/models/*", "team", 404, "ModelNotFound"),
        ("GET /metrics", "team", 403, "PermissionDenied"),
        ("POST /v1/load_lora_adapter", "team", 403, "PermissionDenied"),
        ("POST /v1/load_lora_adapter", "ops", 400, "InvalidRequest"),
        ("GET /v1/status", "ops", 200, "completed"),
    ]
    assert [line["request_id"] for line in lines] == asked
    assert lines[0]["num_completion_tokens"] == 3 and "num_completion_tokens" not in lines[4]
    assert len({line["key_id"] for line in lines if line["tenant"] == "team"} - {""}) == 1
    assert "secret" not in log.read_text() and key not in log.read_text()


async def test_every_call_over_grpc_has_its_line(tmp_path: Path) -> None:
    log, key = tmp_path / "audit.jsonl", key_of(tmp_path, "team")
    ops = key_of(tmp_path, "ops", "--scope", "admin")
    async with with_tenants(tmp_path, "{}", audit_log=log) as one:
        infer, admin = inference_pb2_grpc.InferenceStub(one.channel), admin_pb2_grpc.AdminStub(one.channel)
        sampling = common_pb2.SamplingParams(max_tokens=2)
        generate = inference_pb2.GenerateRequest(text="secret words", sampling=sampling)
        load = replica_pb2.LoadAdapterRequest(name="x", path="x")
        unload = replica_pb2.UnloadAdapterRequest(name="x")

        async def code_of(call: Any) -> str:
            try:
                if isinstance(call, grpc.aio.UnaryStreamCall):
                    assert [part async for part in call]
                else:
                    await call
            except grpc.aio.AioRpcError as error:
                return error.code().name
            return "OK"

        assert await code_of(infer.Generate(generate, metadata=metadata(key))) == "OK"
        assert await code_of(infer.Generate(generate)) == "UNAUTHENTICATED"
        empty = inference_pb2.GenerateRequest()
        assert await code_of(infer.Generate(empty, metadata=metadata(key))) == "INVALID_ARGUMENT"
        tokenize = inference_pb2.TokenizeRequest(text="x")
        assert await code_of(infer.Tokenize(tokenize, metadata=metadata(key))) == "OK"
        flush = one.channel.unary_unary("/vllm.grpc.engine.VllmEngine/FlushCache")
        assert await code_of(flush(b"", metadata=metadata(key))) == "UNIMPLEMENTED"
        assert await code_of(admin.Drain(admin_pb2.DrainRequest(), metadata=metadata(key))) == "PERMISSION_DENIED"
        dump = admin_pb2.DumpReplicaRecordRequest(replica="r0")
        assert await code_of(admin.DumpRecord(dump, metadata=metadata(ops))) == "OK"
        assert await code_of(admin.LoadAdapter(load, metadata=metadata(ops))) == "INVALID_ARGUMENT"
        assert await code_of(admin.UnloadAdapter(unload, metadata=metadata(ops))) == "INVALID_ARGUMENT"
        assert await code_of(admin.Drain(admin_pb2.DrainRequest(replica="r0"), metadata=metadata(ops))) == "OK"
        health = one.channel.unary_unary("/grpc.health.v1.Health/Check")
        assert await code_of(health(b"")) == "OK"
    lines = lines_of(log)
    # A client may have its answer before the call's end on the server.
    assert Counter(map(told, lines)) == Counter(
        [
            (f"{INFERENCE}/Generate", "team", 200, "completed"),
            (f"{INFERENCE}/Generate", "", 401, "UNAUTHENTICATED"),
            (f"{INFERENCE}/Generate", "team", 400, "INVALID_ARGUMENT"),
            (f"{INFERENCE}/Tokenize", "team", 200, "completed"),
            ("vllm.grpc.engine.VllmEngine/FlushCache", "team", 501, "UNIMPLEMENTED"),
            (f"{ADMIN}/Drain", "team", 403, "PERMISSION_DENIED"),
            (f"{ADMIN}/DumpRecord", "ops", 200, "completed"),
            (f"{ADMIN}/LoadAdapter", "ops", 400, "INVALID_ARGUMENT"),
            (f"{ADMIN}/UnloadAdapter", "ops", 400, "INVALID_ARGUMENT"),
            (f"{ADMIN}/Drain", "ops", 200, "completed"),
        ]
    )
    (call,) = [line for line in lines if "call_id" in line]
    assert call["num_completion_tokens"] == 2 and "secret" not in log.read_text()


async def test_a_response_in_the_background_has_one_line_with_all_it_used(tmp_path: Path) -> None:
    log, key = tmp_path / "audit.jsonl", key_of(tmp_path, "team")
    gate = Gate(before=[300], after=[301, 302])
    async with with_tenants(tmp_path, "{}", gate, audit_log=log) as one:
        body = {"model": "m", "input": "Hi", "background": True}
        begun = await one.http.post("/v1/responses", json=body, headers=bearer(key))
        assert begun.status_code == 200, begun.text
        path = f"/v1/responses/{begun.json()['id']}"
        gate.opened.set()
        stream = await one.http.get(path, params={"stream": "true"}, headers=bearer(key))
        assert '"output_tokens":3' in stream.text
        assert (await one.http.delete(path, headers=bearer(key))).status_code == 200
    lines = lines_of(log)
    assert sorted(map(told, lines)) == [
        ("DELETE /v1/responses/*", "team", 200, "completed"),
        ("GET /v1/responses/*", "team", 200, "completed"),
        ("POST /v1/responses", "team", 200, "completed"),
    ]
    assert {line["route"]: line.get("num_completion_tokens") for line in lines} == {
        "POST /v1/responses": 3,
        "GET /v1/responses/*": None,
        "DELETE /v1/responses/*": None,
    }


async def test_a_stream_that_its_client_leaves_has_one_line(tmp_path: Path) -> None:
    log, key = tmp_path / "audit.jsonl", key_of(tmp_path, "team")
    async with with_tenants(tmp_path, "{}", endless, audit_log=log) as one:
        body = completion(stream=True, max_tokens=50)
        async with one.http.stream("POST", "/v1/completions", json=body, headers=bearer(key)) as response:
            await anext(response.aiter_lines())
        stub = inference_pb2_grpc.InferenceStub(one.channel)
        call = stub.Generate(inference_pb2.GenerateRequest(text="x"), metadata=metadata(key))
        assert await call.read()
        call.cancel()
        await one.backend.until(lambda: not one.backend.live and len(one.backend.requests) == 2)
    assert [(line["status"], line["outcome"]) for line in lines_of(log)] == [(499, "cancelled")] * 2
    assert {line["route"] for line in lines_of(log)} == {"POST /v1/completions", f"{INFERENCE}/Generate"}


def used(status: int = 200, outcome: str = "completed") -> UsageRecord:
    return UsageRecord(1.0, "cmpl-1", "team", "k", "m", outcome, status, 5, 0, 7, 0.1)


def test_a_line_waits_for_both_the_response_and_the_call() -> None:
    for ends_first in ("call", "response"):
        lines: list[AuditRecord] = []
        audited = Audited("r", "POST /x", lines.append)
        audited.call_begins()
        if ends_first == "call":
            audited.call_ended(used())
            assert not lines
            audited.responded(200, "completed")
        else:
            audited.responded(200, "completed")
            assert not lines
            audited.call_ended(used())
        audited.responded(499, "cancelled")
        (line,) = lines
        assert (line.status, line.call_id, line.num_completion_tokens) == (200, "cmpl-1", 7)


def test_a_call_that_fails_after_its_stream_began_is_told_as_it_ended() -> None:
    lines: list[AuditRecord] = []
    audited = Audited("r", "POST /x", lines.append)
    audited.call_begins()
    audited.call_ended(used(500, "RankFailure"))
    audited.responded(200, "completed")
    assert [(line.status, line.outcome) for line in lines] == [(500, "RankFailure")]


def test_requests_are_apart_and_outside_of_them_nobody_is_told(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    current_audited().responded(200, "completed")
    with log.request("one", "GET /x") as one, log.request("two\ud800" + "x" * 1000, "GET /y") as two:
        assert current_audited() is two
        one.responded(200, "completed")
    log.close()
    lines = lines_of(tmp_path / "audit.jsonl")
    assert [(line["route"], line["status"]) for line in lines] == [("GET /x", 200), ("GET /y", 499)]
    assert max(len(line["request_id"]) for line in lines) < 300


def test_every_grpc_code_has_an_http_status() -> None:
    assert set(HTTP_STATUS_OF) == set(grpc.StatusCode)
