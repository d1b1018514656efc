"""Thousands of bad inputs over HTTP and gRPC to a served cluster: it answers each, keeps nothing of it and stays well.

A fault names the command that repeats it. ``--seed N`` gives other inputs.
"""

import grpc
import httpx
import pytest

from cluster.rpc.generated.remuda.v1 import inference_pb2, inference_pb2_grpc
from tests.fuzz.campaign import Fuzzer, Report
from tests.fuzz.footprint import Footprint, footprints, idle
from tests.support.served import Served, processes_with

NUM_BAD, NUM_BAD_FULL = 5_000, 50_000
_MORE_MEMORY_BYTES, _MORE_BYTES_AN_INPUT = 8 << 20, 4 << 10
"""Of one process, after the first fifth of the inputs: what allocators and caches keep and what is stored on purpose. A
request that is not given back has more."""
_MORE_FILES, _MORE_THREADS = 8, 8
_IN_THE_LOG = ("Traceback", "never retrieved", "in our own code", "Segmentation")


async def good_answers(served: Served) -> tuple[str, str]:
    """What a good request gets, over HTTP and over gRPC."""
    body = {"model": "remuda-tiny", "prompt": "The herd came down", "max_tokens": 12, "temperature": 0}
    async with httpx.AsyncClient(base_url=served.url, trust_env=False, timeout=30) as client:
        answer = await client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
    async with grpc.aio.insecure_channel(served.target) as channel:
        request = inference_pb2.GenerateRequest(text="The herd came down")
        request.sampling.max_tokens, request.sampling.temperature = 12, 0.0
        call = inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=30)
        text = "".join([each.delta.text async for each in call])
    return answer.json()["choices"][0]["text"], text


async def sent(fuzzer: Fuzzer, report: Report, num_bad: int) -> None:
    """Until so many were refused. What is accepted was no bad input after all."""
    await fuzzer.run(report, lambda so_far: so_far.num_refused >= num_bad)
    assert not report.faults, report.told()


async def attacked(served: Served, seed: int, num_bad: int) -> Report:
    log_began = len(served.log.read_text())
    before = await good_answers(served)
    assert before[0] == before[1]
    fuzzer, report = Fuzzer(seed, served.port, served.grpc_port), Report(seed)
    await sent(fuzzer, report, num_bad // 5)
    await idle(served.url)
    early, num_early = footprints(process.pid for process in processes_with(served.mark)), report.num_inputs
    await sent(fuzzer, report, num_bad)
    await idle(served.url)
    late = footprints(early)
    more_memory_bytes = _MORE_MEMORY_BYTES + _MORE_BYTES_AN_INPUT * (report.num_inputs - num_early)
    assert await good_answers(served) == before
    for pid, was in early.items():
        if pid in late:  # Ray's workers without work come and go
            held(pid, was, late[pid], more_memory_bytes)
    said = served.log.read_text()[log_began:]
    assert not [line for line in said.splitlines() if any(mark in line for mark in _IN_THE_LOG)], said[-4000:]
    return report


def held(pid: int, was: Footprint, now: Footprint, more_memory_bytes: int) -> None:
    assert now.memory_bytes - was.memory_bytes <= more_memory_bytes, f"process {pid}: {was} -> {now}"
    assert now.num_files - was.num_files <= _MORE_FILES, f"process {pid}: {was} -> {now}"
    assert now.num_threads - was.num_threads <= _MORE_THREADS, f"process {pid}: {was} -> {now}"


def told(report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(
            f"\nseed {report.seed}: {report.num_inputs} inputs, {report.num_refused} refused, "
            f"slowest {report.slowest[0]:.2f} s (--index {report.slowest[1]})"
        )


@pytest.mark.timeout(240)
async def test_bad_inputs(served: Served, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> None:
    report = await attacked(served, request.config.getoption("--seed"), NUM_BAD)
    told(report, capsys)
    # Every kind of input came, and good ones were still known as such: not everything dies at the first check.
    assert len(report.kinds) >= 14 and report.num_inputs - report.num_refused > NUM_BAD // 20, report
    assert report.outcomes["http 400"] > NUM_BAD // 5 and report.outcomes["grpc 3"] > NUM_BAD // 20, report.outcomes


@pytest.mark.full
@pytest.mark.timeout(1800)
async def test_many_bad_inputs(
    served: Served, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    report = await attacked(served, request.config.getoption("--seed") + 1, NUM_BAD_FULL)
    told(report, capsys)
