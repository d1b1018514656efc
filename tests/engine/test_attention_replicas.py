"""Data-parallel attention in real processes: a batch per group, each with slots, blocks and samples of its own, against
transformers."""

import os
import signal
import threading
import time
from typing import Any

import numpy as np
import pytest

from engine.config import Dtype
from engine.errors import RankFailure
from engine.request import Output
from tests.parity.reference import Reference
from tests.support.gang_engine import gang_engine, make_request, tokens_of

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param({"dp": 2}, id="dp2"),
        pytest.param({"dp": 2, "tp": 2, "max_num_batched_tokens": 16, "depth": 2}, id="dp2-tp2-chunked"),
        pytest.param({"dp": 2, "pp": 2, "depth": 2}, id="dp2-pp2"),
        pytest.param({"dp": 4, "tp": 2, "pp": 1, "depth": 2}, id="dp4-tp2", marks=pytest.mark.full),
    ],
)
def test_groups_compute_what_transformers_does(dense: Reference, layout: dict[str, int]) -> None:
    """More requests than one group has slots; log-probabilities of prompts come from every group."""
    requests = [
        make_request(f"{copy}-{i}", prompt, prompt_logprobs=2)
        for copy in range(3)
        for i, prompt in enumerate(dense.prompts)
    ]
    with gang_engine(dense, **{"max_num_seqs": 5} | layout) as served:
        outputs = served.run(requests)
    assert [process.returncode for process in served.gang.processes] == [0] * len(served.gang.processes)
    for request in requests:
        expected = dense.generated[int(request.request_id[2:])].token_ids
        assert tokens_of(outputs[request.request_id]) == expected[len(request.token_ids) :]
        assert _num_prompt_entries(outputs[request.request_id]) == len(request.token_ids)


def _num_prompt_entries(outputs: list[Output]) -> int:
    return sum(len(output.prompt_logprobs or []) for output in outputs)


def test_a_group_without_requests(dense: Reference) -> None:
    """One request at a time: the other group gets empty batches, and takes its turn afterwards."""
    with gang_engine(dense, dp=2, tp=2) as served:
        for i, prompt in enumerate(dense.prompts):
            outputs = served.run([make_request(f"r{i}", prompt)])
            assert tokens_of(outputs[f"r{i}"]) == dense.generated[i].token_ids[len(prompt) :]


def test_streams_do_not_depend_on_their_group(dense: Reference) -> None:
    """Seeds, penalties and a cache so small that requests are computed again."""
    options: list[dict[str, Any]] = [
        {"temperature": 1.0, "seed": 7},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 8, "repetition_penalty": 1.2},
        {"temperature": 0.0, "stop_token_ids": (5, 6, 7, 8, 9, 10, 11)},
    ]
    requests = [
        make_request(f"{i}-{j}-{copy}", prompt, **option)
        for i, prompt in enumerate(dense.prompts)
        for j, option in enumerate(options)
        for copy in range(2)
    ]
    with gang_engine(dense) as alone:
        expected = {name: tokens_of(outputs) for name, outputs in alone.run(requests).items()}
        block_bytes = 2**20 // alone.gang.ready.cache.num_blocks
    with gang_engine(dense, dp=2, kv_cache_memory_bytes=40 * block_bytes) as served:
        assert served.gang.ready.cache.num_blocks == 40
        assert served.engine.stats().num_blocks == 2 * 39
        assert {name: tokens_of(outputs) for name, outputs in served.run(requests).items()} == expected
        assert served.engine.stats().num_preemptions > 0


def test_a_rank_that_is_killed_in_another_group_is_named(dense: Reference) -> None:
    with gang_engine(dense, dp=2) as served:
        for i, prompt in enumerate(dense.prompts):
            served.engine.add(make_request(f"r{i}", prompt, max_tokens=80))
        for _ in range(3):
            served.engine.step()
        os.kill(served.gang.processes[1].pid, signal.SIGKILL)
        killed_at = time.monotonic()
        with pytest.raises(RankFailure, match="rank 1") as failure:
            while True:
                served.engine.step()
        assert failure.value.rank == 1
        assert time.monotonic() - killed_at < 5.0


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param({"dp": 2, "tp": 2, "ep": 4, "depth": 2}, id="dp2-tp2-ep4"),
        pytest.param({"dp": 2, "pp": 2, "ep": 2, "depth": 3, "max_num_batched_tokens": 16}, id="dp2-pp2-chunked"),
        pytest.param({"dp": 4, "ep": 2}, id="dp4-ep2", marks=pytest.mark.full),
    ],
)
def test_experts_work_for_all_groups(mixture: Reference, layout: dict[str, int]) -> None:
    """Groups are at different places in their requests, and some are idle while others compute."""
    requests = [make_request(f"{copy}-{i}", prompt) for copy in range(3) for i, prompt in enumerate(mixture.prompts)]
    with gang_engine(mixture, **{"max_num_seqs": 5} | layout) as served:
        outputs = served.run(requests)
        for i, prompt in enumerate(mixture.prompts):
            outputs |= served.run([make_request(f"alone-{i}", prompt)])
    assert [process.returncode for process in served.gang.processes] == [0] * len(served.gang.processes)
    for name, found in outputs.items():
        i = int(name.split("-")[1])
        assert tokens_of(found) == mixture.generated[i].token_ids[len(mixture.prompts[i]) :]


def test_bfloat16_in_groups_is_that_of_one_rank(mixture: Reference) -> None:
    """Through the kernels for that format, also where a group is idle: its ranks get tokens and have none."""
    prompts = {f"r{i}": prompt for i, prompt in enumerate(mixture.prompts)}
    logprobs: list[list[float]] = []
    for layout in ({}, {"dp": 2, "tp": 2, "ep": 2}):
        with gang_engine(mixture, dtype=Dtype.BFLOAT16, **layout) as served:
            found = [
                entry.logprob
                for name, prompt in prompts.items()
                for output in served.run([make_request(name, prompt, max_tokens=1, prompt_logprobs=0)])[name]
                for entry in output.prompt_logprobs or []
                if entry is not None
            ]
        logprobs.append(found)
    differences = np.abs(np.array(logprobs[0]) - np.array(logprobs[1]))
    assert len(differences) == sum(len(prompt) - 1 for prompt in mixture.prompts)
    # A token that another expert gets by a rounded score differs by more; most must not.
    assert np.median(differences) < 0.05


def test_a_rank_that_is_killed_in_an_exchange_is_named(mixture: Reference) -> None:
    """It is stopped first, so that the others wait for its rows in the middle of a step."""
    with gang_engine(mixture, dp=2, tp=2, ep=4) as served:
        for i, prompt in enumerate(mixture.prompts):
            served.engine.add(make_request(f"r{i}", prompt, max_tokens=200))
        for _ in range(3):
            served.engine.step()
        victim = served.gang.processes[3].pid
        os.kill(victim, signal.SIGSTOP)
        threading.Timer(0.5, os.kill, (victim, signal.SIGKILL)).start()
        killed_at = time.monotonic()
        with pytest.raises(RankFailure, match="rank 3") as failure:
            while True:
                served.engine.step()
        assert failure.value.rank == 3
        assert time.monotonic() - killed_at < 5.0
