"""That the fuzzer sees what it is there for: a wrong key let in, a key told, a refusal that is late, a death."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import psutil
import pytest

from tests.fuzz import campaign
from tests.fuzz.campaign import Fuzzer
from tests.fuzz.grpc_inputs import GrpcInput
from tests.fuzz.grpc_wire import GrpcAnswer
from tests.fuzz.guarded import Guard, Shown
from tests.fuzz.guarded_inputs import GuardedInput, grpc_breach, guarded, http_breach
from tests.fuzz.http_framing import HOST, HttpInput, request
from tests.fuzz.http_wire import HttpAnswer
from tests.fuzz.verdicts import http_fault
from tests.support.deaths import Watched

NOBODY, INFER, ADMIN = Shown("nothing", ()), Shown("a", (), frozenset({"infer"})), Shown("b", (), frozenset({"admin"}))


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Guard:
    return Guard.make(tmp_path_factory.mktemp("guard"))


def asked(path: bytes, *shown: Shown, kind: str = "mutated") -> GuardedInput:
    return GuardedInput(HttpInput(kind, "GET", request("GET", path, b"", b""), len(shown)), shown)


def answers(*statuses: int) -> list[HttpAnswer]:
    return [HttpAnswer(status, {}, b"") for status in statuses]


@pytest.mark.parametrize(
    ("path", "shown", "right", "wrong"),
    [
        (b"/v1/models", NOBODY, 401, 200),
        (b"/v1/models", NOBODY, 401, 400),  # it was looked at before it was known whose it is
        (b"/v1/models", ADMIN, 403, 200),
        (b"/v1/status?a=b", INFER, 403, 200),
        (b"/v1/%73tatus", INFER, 403, 200),
    ],
)
def test_what_http_may_answer(path: bytes, shown: Shown, right: int, wrong: int) -> None:
    assert http_breach(asked(path, shown), answers(right)) is None
    assert http_breach(asked(path, shown), answers(wrong)) is not None


def test_each_request_of_a_connection_counts_alone() -> None:
    given = asked(b"/v1/models", INFER, NOBODY, INFER, kind="pipelined")
    assert http_breach(given, answers(200, 401, 200)) is None
    assert http_breach(given, answers(200, 200, 200)) is not None


def test_what_is_open_is_open() -> None:
    assert http_breach(asked(b"/livez", NOBODY), answers(200)) is None
    call = GrpcInput("spoilt", b"/grpc.health.v1.Health/Check", b"")
    assert grpc_breach(GuardedInput(call, (NOBODY,)), GrpcAnswer(200, 0)) is None


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        (b"/remuda.v1.Inference/Generate", NOBODY),
        (b"/remuda.v1.Inference/Generate", ADMIN),
        (b"/remuda.v1.Admin/GetStatus", INFER),
    ],
)
def test_what_grpc_may_answer(path: bytes, shown: Shown) -> None:
    given = GuardedInput(GrpcInput("spoilt", path, b""), (shown,))
    assert grpc_breach(given, GrpcAnswer(200, 0)) is not None
    assert grpc_breach(given, GrpcAnswer(200, 3, data=b"a")) is not None
    assert grpc_breach(given, GrpcAnswer(200, 16)) is None
    assert (grpc_breach(given, GrpcAnswer(200, 3)) is not None) == (shown is NOBODY)


def test_inputs_show_what_they_say(guard: Guard, seed: int) -> None:
    """In their bytes, each request its own; half of them nothing that is right."""
    given = HttpInput("pipelined", "GET", request("GET", b"/v1/models", b"", b"") * 12, 12)
    rng = Random(seed)
    made = [found for _ in range(200) if not (found := guarded(given, guard, rng)).in_clear]
    for each in made:
        assert isinstance(each.given, HttpInput) and len(each.shown) == 12
        heads = each.given.data.split(HOST)[1:]
        assert all(head.startswith(shown.lines) for head, shown in zip(heads, each.shown, strict=True))
    assert len({shown.name for each in made for shown in each.shown}) >= 15
    keys = {name: key.encode() for name, key in guard.keys.items() if name not in ("revoked", "expired")}
    for each in made:
        for shown in each.shown:
            # One header, and it is a whole key: nothing else is let in.
            is_right = len(shown.pairs) == 1 and shown.pairs[0] in [
                pair for key in keys.values() for pair in ((b"authorization", b"Bearer " + key), (b"x-api-key", key))
            ]
            assert is_right == bool(shown.scopes), shown


@pytest.mark.parametrize(("text", "is_fault"), [(f"{Path.home()}/a", True), (f"{Path.home()} ::= a", False)])
def test_a_path_of_this_machine_is_told_from_what_was_asked(text: str, is_fault: bool) -> None:
    given = HttpInput("paths", "GET", request("GET", b"/v1/models", b"", b""))
    assert (http_fault(given, [HttpAnswer(404, {}, text.encode())]) is not None) == is_fault


@asynccontextmanager
async def answering(response: bytes, after_s: float = 0.0) -> AsyncIterator[int]:
    """A server's port, which answers whatever it gets."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1 << 16)
        await asyncio.sleep(after_s)
        writer.write(response)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1")
    async with server:
        yield server.sockets[0].getsockname()[1]


async def fault_of(monkeypatch: pytest.MonkeyPatch, port: int, given: campaign.Input) -> str | None:
    fuzzer = Fuzzer(0, port, port)
    monkeypatch.setattr(fuzzer, "input", lambda index: given)
    return (await fuzzer.answered(0))[2]


@pytest.mark.parametrize(("status", "is_fault"), [(b"400 Bad Request", True), (b"200 OK", False)])
async def test_a_refusal_must_not_be_late(monkeypatch: pytest.MonkeyPatch, status: bytes, is_fault: bool) -> None:
    monkeypatch.setattr(campaign, "_REFUSAL_S", 0.05)
    given = HttpInput("mutated", "GET", request("GET", b"/v1/models", b"", b""))
    async with answering(b"HTTP/1.1 " + status + b"\r\ncontent-length: 0\r\n\r\n", after_s=0.1) as port:
        fault = await fault_of(monkeypatch, port, given)
    assert (fault is not None and "refused after" in fault) == is_fault, fault


async def test_no_part_of_a_key_may_be_told(monkeypatch: pytest.MonkeyPatch, guard: Guard) -> None:
    told = guard.keys["infer"][-20:].encode()
    response = b"HTTP/1.1 401 Unauthorized\r\ncontent-length: %d\r\n\r\n%b"
    given = asked(b"/v1/models", NOBODY)
    for body, is_fault in ((told, True), (told[:9], False)):
        async with answering(response % (len(body), body)) as port:
            fuzzer = Fuzzer(0, port, port, guard)
            monkeypatch.setattr(fuzzer, "_tls", (None, None))
            monkeypatch.setattr(fuzzer, "input", lambda index: given)
            _, _, fault = await fuzzer.answered(0)
        assert (fault is not None) == is_fault, fault


def test_a_death_is_told_with_its_stack(tmp_path: Path) -> None:
    code = "import ctypes, sys\ndef fell():\n    sys.stdin.read(1)\n    ctypes.string_at(0)\nfell()"
    log = tmp_path / "log"
    with log.open("wb") as sink:
        command = [sys.executable, "-X", "faulthandler", "-c", code]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=sink)
    with pytest.raises(AssertionError) as caught, Watched([psutil.Process(process.pid)], [log]):
        process.communicate(b".", timeout=20)
        assert process.returncode == -signal.SIGSEGV
    assert "in fell" in str(caught.value)
    assert (f"process {process.pid} " in str(caught.value)) == _kernel_tells()


def _kernel_tells() -> bool:
    """Since Linux 6.15 how a process ended can be asked."""
    major, minor = os.uname().release.split(".")[:2]
    return (int(major), int(minor)) >= (6, 15)
