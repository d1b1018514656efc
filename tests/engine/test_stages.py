"""Pipeline stages in real processes: the engine, several plans in flight and every rank's own layers, against
transformers."""

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil
import pytest

from engine.engine import Engine
from engine.errors import RankFailure
from engine.request import FinishReason, Output
from tests.parity.reference import Reference
from tests.support.gang_engine import gang_engine, make_request, tokens_of

pytestmark = pytest.mark.timeout(120)


# Pairs of everything: stages, tensor-parallel ranks, plans in flight, whole prompts and chunks, model, experts.
LAYOUTS = [
    pytest.param("mixture", {"pp": 2, "tp": 2, "ep": 2, "depth": 3}, id="mixture-pp2-tp2-ep2"),
    pytest.param("mixture", {"pp": 4, "tp": 1, "depth": 4, "max_num_batched_tokens": 16}, id="mixture-pp4-chunked"),
    pytest.param("dense", {"pp": 2, "tp": 2, "depth": 3, "max_num_batched_tokens": 16}, id="dense-pp2-tp2-chunked"),
    pytest.param("mixture", {"pp": 4, "tp": 2, "depth": 5}, id="mixture-pp4-tp2", marks=pytest.mark.full),
]


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_stages_compute_what_transformers_does(
    request: pytest.FixtureRequest, name: str, layout: dict[str, int]
) -> None:
    """Tokens, log-probabilities of all of the vocabulary, and those of the prompts, from several plans in flight."""
    reference: Reference = request.getfixturevalue(name)
    requests = [
        make_request(f"{copy}-{i}", prompt, logprobs=20, prompt_logprobs=2)
        for copy in range(3)
        for i, prompt in enumerate(reference.prompts)
    ]
    with gang_engine(reference, **layout) as served:
        outputs = served.run(requests)
        assert served.most_in_flight >= layout["pp"] - 1
    assert [process.returncode for process in served.gang.processes] == [0] * (layout["pp"] * layout["tp"])
    for found in requests:
        prompt, generated = found.token_ids, reference.generated[int(found.request_id[2:])]
        assert tokens_of(outputs[found.request_id]) == generated.token_ids[len(prompt) :]
        logits = generated.logits.astype(np.float64)
        expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        steps = [entry for output in outputs[found.request_id] for entry in output.logprobs or []]
        for step, entry in enumerate(steps):
            row = expected[len(prompt) - 1 + step]
            assert entry.logprobs == pytest.approx(row[entry.token_ids].tolist(), abs=1e-4)
        prompt_entries = [entry for output in outputs[found.request_id] for entry in output.prompt_logprobs or []]
        assert len(prompt_entries) == len(prompt) and prompt_entries[0] is None
        for position, prompt_entry in enumerate(prompt_entries[1:], 1):
            assert prompt_entry is not None
            assert prompt_entry.logprob == pytest.approx(expected[position - 1][prompt[position]], abs=1e-4)


def test_sampled_streams_are_those_of_one_rank(mixture: Reference) -> None:
    """Seeds, penalties, stops, an abort, and a cache so small that requests are computed again."""
    options: list[dict[str, Any]] = [
        {"temperature": 1.0, "seed": 7},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 8, "repetition_penalty": 1.2},
        {"temperature": 1.2, "min_p": 0.02, "seed": -9, "frequency_penalty": 0.5, "presence_penalty": 0.3},
        {"temperature": 0.0, "stop_token_ids": (5, 6, 7, 8, 9, 10, 11)},
    ]
    requests = [
        make_request(f"s{i}-{j}", prompt, **option)
        for i, prompt in enumerate(mixture.prompts)
        for j, option in enumerate(options)
    ]
    with gang_engine(mixture) as alone:
        expected = {name: tokens_of(outputs) for name, outputs in alone.run(requests).items()}
        block_bytes = 2**20 // alone.gang.ready.cache.num_blocks
    with gang_engine(mixture, pp=2, depth=2, kv_cache_memory_bytes=40 * block_bytes) as served:
        assert served.gang.ready.cache.num_blocks == 40
        assert {name: tokens_of(outputs) for name, outputs in served.run(requests).items()} == expected
        assert served.engine.stats().num_preemptions > 0
        for request in requests[:4]:
            served.engine.add(request)
        served.engine.step()
        assert served.engine.abort("s0-1")
        ends = [output for output in iter_outputs(served.engine) if output.finish_reason is FinishReason.ABORT]
        assert [output.request_id for output in ends] == ["s0-1"]


def iter_outputs(engine: Engine) -> Iterator[Output]:
    while engine.has_work:
        yield from engine.step()


@pytest.mark.parametrize(
    "victim", [pytest.param(0, marks=pytest.mark.full), 1, pytest.param(2, marks=pytest.mark.full)]
)
def test_a_rank_that_is_killed_in_a_stage_is_named(mixture: Reference, victim: int) -> None:
    with gang_engine(mixture, pp=3, depth=3) as served:
        for i, prompt in enumerate(mixture.prompts):
            served.engine.add(make_request(f"r{i}", prompt, max_tokens=200))
        for _ in range(3):
            served.engine.step()
        os.kill(served.gang.processes[victim].pid, signal.SIGKILL)
        killed_at = time.monotonic()
        with pytest.raises(RankFailure, match=f"rank {victim}") as failure:
            while True:
                served.engine.step()
        assert failure.value.rank == victim
        assert time.monotonic() - killed_at < 5.0
    assert not [child for child in psutil.Process().children() if child.name().startswith("remuda: rank")]


@pytest.mark.full
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_hangs_is_named_by_the_stage_that_waits_for_it(mixture: Reference, victim: int) -> None:
    with gang_engine(mixture, pp=3, depth=3, collective_timeout_s=2.0) as served:
        for i, prompt in enumerate(mixture.prompts):
            served.engine.add(make_request(f"r{i}", prompt, max_tokens=200))
        for _ in range(3):
            served.engine.step()
        os.kill(served.gang.processes[victim].pid, signal.SIGSTOP)
        try:
            with pytest.raises(RankFailure) as failure:
                while True:
                    served.engine.step()
        finally:
            os.kill(served.gang.processes[victim].pid, signal.SIGCONT)
        assert failure.value.rank == victim
