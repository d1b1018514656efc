"""``remuda bench`` against a front end whose every delay is known."""

import asyncio
import json
import sys
from collections.abc import AsyncGenerator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import typer

from cluster.bench.options import BenchOptions
from cluster.bench.run import run_bench
from cluster.cli import bench as bench_command
from cluster.cli.main import app
from cluster.errors import ServingError, Unauthenticated, Unavailable
from engine.errors import EngineFailure, InvalidOption, RemudaError
from engine.request import FinishReason, Output, Request
from tests.frontend.scripted import ScriptedBackend
from tests.frontend.servers import served

FIRST_S, NEXT_S = 0.1, 0.02
NUM_OUTPUT = 8
WORD = 300
# Sleeping ends late, and the machine may be busy; never early, but for what one read may bring together.
LATE = 3.0


async def paced(request: Request) -> AsyncGenerator[Output, None]:
    for index in range(request.sampling.max_tokens):
        await asyncio.sleep(NEXT_S if index else FIRST_S)
        reason = FinishReason.LENGTH if index == request.sampling.max_tokens - 1 else None
        yield Output(request.request_id, [WORD + index % 4], finish_reason=reason)


async def bench(*arguments: str) -> tuple[int, str, str]:
    command = [str(Path(sys.executable).parent / "remuda"), "bench", *arguments]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)
    output, error = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode or 0, output.decode(), error.decode()


def options(target: str, *arguments: str) -> BenchOptions:
    """What the command makes of its options, without a process."""
    made: list[BenchOptions] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_command, "_run", lambda wanted, plot, as_json: made.append(wanted))
        typer.main.get_command(app)(
            ["bench", "--target", target, "--output-len", str(NUM_OUTPUT), *arguments], standalone_mode=False
        )
    return made[0]


async def measured(target: str, *arguments: str) -> dict[str, Any]:
    """Here and now, in the server's own event loop."""
    report, timings = await run_bench(options(target, *arguments))
    assert len(timings) == report.num_ok + report.num_failed
    return asdict(report)


def within(seconds: float, expected_s: float) -> bool:
    return 0.95 * expected_s <= seconds <= LATE * expected_s


def check_times(found: dict[str, Any]) -> None:
    assert (found["num_ok"], found["num_failed"], found["errors"]) == (6, 0, {})
    assert within(found["ttft_s"]["p50"], FIRST_S)
    assert within(found["itl_s"]["p50"], NEXT_S)
    assert within(found["token_s"]["p50"], NEXT_S)
    assert within(found["e2e_s"]["p50"], FIRST_S + (NUM_OUTPUT - 1) * NEXT_S)
    assert found["duration_s"] >= 2 * found["e2e_s"]["p50"] * 0.95
    assert found["output_tokens_per_s"] == pytest.approx(6 * NUM_OUTPUT / found["duration_s"])
    assert found["mean_output_tokens"] == NUM_OUTPUT
    assert found["mean_input_tokens"] == pytest.approx(80, rel=0.15)


THREE_AT_A_TIME = ("--concurrency", "3", "--num-requests", "6", "--prompt-len", "80")


@pytest.mark.parametrize("api", ["chat", "grpc"])
async def test_measured_times_are_the_servers(api: str) -> None:
    async with served(paced) as one:
        if api == "chat":
            found = await measured(one.url, *THREE_AT_A_TIME, "--chat")
        else:
            found = await measured(f"127.0.0.1:{one.front_end.grpc_port}", *THREE_AT_A_TIME)
    check_times(found)


async def test_the_command_measures_and_draws(tmp_path: Path) -> None:
    plot = tmp_path / "plot.html"
    async with served(paced) as one:
        status, output, error = await bench(
            *("--target", one.url, *THREE_AT_A_TIME, "--output-len", str(NUM_OUTPUT), "--json", "--plot", str(plot))
        )
    assert (status, error) == (0, "")
    check_times(json.loads(output))
    assert "<svg" in plot.read_text()


async def test_an_open_loop_does_not_wait_for_answers(tmp_path: Path) -> None:
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps(list(range(300, 1300))))
    backend = ScriptedBackend(paced)
    most = 0

    async def counted(request: Request) -> AsyncGenerator[Output, None]:
        nonlocal most
        most = max(most, len(backend.live))
        async for output in paced(request):
            yield output

    backend.script = counted
    async with served(backend) as one:
        found = await measured(
            *(f"{one.url}/v1", "--rate", "20", "--arrivals", "constant", "--duration", "0.49"),
            *("--token-ids", str(ids), "--prompt-len", "20", "--shared-prefix-len", "30", "--warm-up", "0"),
            *("--slo", f"e2e={FIRST_S / 2}s"),
        )
    assert found["num_ok"] == 10
    # A request takes 0.24 s and one comes every 0.05 s.
    assert most >= 3
    assert found["mean_input_tokens"] == 50
    prompts = [request.token_ids for request in backend.requests]
    assert len({tuple(prompt[:30]) for prompt in prompts}) == 1
    assert len({tuple(prompt[30:]) for prompt in prompts}) == 10
    assert found["client"]["send_lag_s"]["p99"] < 0.5
    assert found["goodput"]["num_good"] == 0


async def test_the_same_seed_sends_the_same() -> None:
    sent: list[list[list[int]]] = []
    for seed in ("1", "1", "2"):
        backend = ScriptedBackend(paced)
        async with served(backend) as one:
            await measured(one.url, "--num-requests", "3", "--prompt-len", "10-40", "--output-len", "1", "--seed", seed)
        sent.append([request.token_ids for request in backend.requests])
    assert sent[0] == sent[1] != sent[2]


async def test_failures_are_reported_and_keys_are_sent(tmp_path: Path) -> None:
    async def breaks(request: Request) -> AsyncGenerator[Output, None]:
        if len(backend.requests) > 3:
            raise EngineFailure("gone")
        async for output in paced(request):
            yield output

    key = tmp_path / "key"
    key.write_text("secret-of-the-herd\n")
    backend = ScriptedBackend(breaks)
    async with served(backend, key="secret-of-the-herd", api_key_file=key) as one:
        with pytest.raises(Unauthenticated, match="401.*--api-key-file"):
            await measured(one.url)
        arguments = ("--num-requests", "3", "--warm-up", "0", "--api-key-file", str(key))
        found = await measured(one.url, *arguments)
        assert (found["num_ok"], found["num_failed"]) == (1, 2)
        assert [("gone" in message, count) for message, count in found["errors"].items()] == [(True, 2)]
        with pytest.raises(ServingError, match="gone"):  # of the first request of all
            await measured(one.url, *arguments)


async def test_a_command_without_a_server_ends_in_one_line() -> None:
    status, output, error = await bench("--target", "http://127.0.0.1:1")
    assert (status, output) == (1, "")
    assert error.count("\n") == 1
    assert error.startswith("remuda: no server answers at http://127.0.0.1:1/v1/models (Connection refused)")


@pytest.mark.parametrize(
    ("target", "arguments", "error", "words"),
    [
        ("127.0.0.1:1", [], Unavailable, "no gRPC API answers at 127.0.0.1:1"),
        ("somewhere", [], InvalidOption, "write HOST:PORT"),
        ("127.0.0.1:1", ["--chat"], InvalidOption, "--chat is of OpenAI's API"),
        ("http://127.0.0.1:1", ["--rate", "1", "--concurrency", "2"], InvalidOption, "give one of them"),
        ("http://127.0.0.1:1", ["--plot", "a.png"], InvalidOption, "--plot a.png: write FILE.html or FILE.svg"),
    ],
)
async def test_what_cannot_be_run_is_refused(
    target: str, arguments: list[str], error: type[RemudaError], words: str
) -> None:
    with pytest.raises(error, match=words):
        await measured(target, *arguments)
