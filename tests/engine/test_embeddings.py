"""Embeddings against transformers' hidden states behind the final norm: on one rank and on several, prompts whole and
in chunks, beside requests that generate."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers

from engine.executor.in_process import InProcessExecutor
from engine.request import FinishReason, Output, Pooling, Request
from tests.parity.reference import Reference
from tests.support.gang_engine import GangEngine, gang_config, gang_engine, make_request, tokens_of

pytestmark = pytest.mark.timeout(120)

Vectors = dict[Pooling, list[npt.NDArray[np.float64]]]
"""Of each of a reference's prompts, of length 1."""


@torch.no_grad()
def expected_of(reference: Reference) -> Vectors:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        reference.directory, attn_implementation="eager", dtype=torch.float32
    ).eval()
    states = [
        model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0] for prompt in reference.prompts
    ]
    found = {Pooling.LAST: [each[-1] for each in states], Pooling.MEAN: [each.mean(0) for each in states]}
    return {
        pooling: [(vector / vector.norm()).double().numpy() for vector in vectors] for pooling, vectors in found.items()
    }


def wanted(reference: Reference, name: str = "") -> list[Request]:
    """Every prompt pooled both ways, and continued."""
    requests = [make_request(f"go{name}-{i}", prompt) for i, prompt in enumerate(reference.prompts)]
    for pooling, (i, prompt) in itertools.product(Pooling, enumerate(reference.prompts)):
        requests.append(make_request(f"{pooling}{name}-{i}", prompt, max_tokens=0, pooling=pooling))
    return requests


def check(reference: Reference, expected: Vectors, outputs: dict[str, list[Output]]) -> None:
    num_checked = 0
    for request_id, found in outputs.items():
        kind, _, index = request_id.partition("-")
        prompt = reference.prompts[int(index)]
        if kind.startswith("go"):
            assert tokens_of(found) == reference.generated[int(index)].token_ids[len(prompt) :]
            continue
        assert vector_of(found) == pytest.approx(expected[Pooling(kind[:4])][int(index)], abs=1e-4)
        num_checked += 1
    assert num_checked


def vector_of(outputs: Sequence[Output]) -> npt.NDArray[np.float32]:
    """Of what one request got: its embedding, with the end, and no token."""
    end = outputs[-1]
    assert end.finish_reason is FinishReason.STOP and end.pooled is not None
    assert not tokens_of(list(outputs)) and all(output.pooled is None for output in outputs[:-1])
    vector = np.frombuffer(end.pooled, "<f4")
    assert np.linalg.norm(vector) == pytest.approx(1.0, abs=1e-5)
    return vector


@pytest.mark.parametrize("budget", [128, 16], ids=["whole", "chunked"])
def test_one_rank(dense: Reference, budget: int) -> None:
    """Also where the same prompts come again, and blocks of them are cached: the last position is computed in any case,
    and for a mean every one."""
    expected = expected_of(dense)
    config = gang_config(dense, max_num_batched_tokens=budget)
    executor = InProcessExecutor(config)
    try:
        served = GangEngine(executor, executor.ready, config)
        for name in ("", "again"):
            outputs = served.run(wanted(dense, name))
            check(dense, expected, outputs)
        for pooling, is_cached in ((Pooling.LAST, True), (Pooling.MEAN, False)):
            assert (outputs[f"{pooling}again-2"][-1].num_cached_tokens > 0) == is_cached
    finally:
        executor.close()


def test_nothing_is_left_of_what_was_preempted_or_aborted(dense: Reference) -> None:
    """Others need the blocks, so that prompts are thrown out half-way and summed up from their beginning again."""
    expected = expected_of(dense)
    config = gang_config(dense, max_num_seqs=4, max_num_batched_tokens=5)
    executor = InProcessExecutor(config)
    num_bytes = 2**20 // executor.ready.cache.num_blocks
    executor.close()
    config = gang_config(dense, max_num_seqs=4, max_num_batched_tokens=5, kv_cache_memory_bytes=21 * num_bytes)
    executor = InProcessExecutor(config)
    try:
        served = GangEngine(executor, executor.ready, config)
        gone = [request for request in wanted(dense, "gone")[::-1] if len(request.token_ids) > 20]
        for request in gone:
            served.engine.add(request)
        served.engine.step()
        assert all(served.engine.abort(request.request_id) for request in gone)
        while served.engine.has_work:
            served.engine.step()
        busy = [make_request(f"busy-{copy}", dense.prompts[0], max_tokens=40) for copy in range(3)]
        outputs = served.run([*busy, *(request for request in wanted(dense) if request.sampling.pooling)])
        assert served.engine.stats().num_preemptions > 0
        check(dense, expected, {name: found for name, found in outputs.items() if "busy" not in name})
    finally:
        executor.close()


# Pairs of: model, tensor and expert parallelism, stages, attention replicas, whole prompts and chunks.
LAYOUTS = [
    pytest.param("dense", {"tp": 2, "max_num_batched_tokens": 16}, id="dense-tp2-chunked"),
    pytest.param("mixture", {"pp": 2, "depth": 2, "max_num_batched_tokens": 16}, id="mixture-pp2-chunked"),
    pytest.param("mixture", {"dp": 2, "ep": 2}, id="mixture-dp2-ep2", marks=pytest.mark.full),
    pytest.param("mixture", {"tp": 2, "ep": 2}, id="mixture-tp2-ep2", marks=pytest.mark.full),
    pytest.param("dense", {"pp": 2, "tp": 2, "depth": 3}, id="dense-pp2-tp2", marks=pytest.mark.full),
]


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_layouts(request: pytest.FixtureRequest, name: str, layout: dict[str, int]) -> None:
    reference: Reference = request.getfixturevalue(name)
    expected = expected_of(reference)
    with gang_engine(reference, **layout) as served:
        check(reference, expected, served.run(wanted(reference)))
