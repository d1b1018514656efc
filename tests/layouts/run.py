"""One model in one layout, as it is served: a leader with the engine and the step channel, ranks on their hosts, and
addresses between them; then everything that they computed against transformers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch

from engine.config import Dtype, ParallelConfig
from engine.executor.defaults import plans_in_flight
from engine.model_config import ModelConfig
from engine.models.registry import build_model
from engine.parallel.distributed import init_distributed
from engine.request import MAX_LOGPROBS, Output, Request
from engine.weights.loader import load_weights
from tests.parity.reference import NUM_NEW, Reference
from tests.support.gang_engine import make_request, tokens_of
from tests.support.hosted_gang import leading, serve_as_rank, small_plan
from tests.support.hosts.bed import Bed
from tests.support.model_driver import Generated, ModelDriver, generate_together
from tests.support.rank_pool import RankContext, run_ranks

TOLERANCE = 1e-4
_NUM_COPIES = 2
_MAX_NUM_SEQS = 4
"""In each dp group: fewer than there are requests, so that some wait."""
_MAX_NUM_BATCHED_TOKENS = 16
"""Under the longest prompt's: it comes in chunks while others decode."""
_BLOCK_SIZE = 4
"""Half of a chunk of Llama 4's chunked layers."""
_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Hosts:
    """Where processes of a gang can be: each host's address and the file of its network namespace; none: only here."""

    addresses: tuple[str, ...] = ("127.0.0.1",)
    networks: tuple[Path, ...] = ()

    @classmethod
    def of(cls, bed: Bed) -> Self:
        return cls(tuple(host.address for host in bed.hosts), tuple(host.network for host in bed.hosts))

    def of_ranks(self, num_ranks: int) -> list[int]:
        """The number of each rank's host: equal runs of neighbours, as far as they can be."""
        return [rank * len(self.addresses) // num_ranks for rank in range(num_ranks)]


@dataclass(frozen=True)
class Answer:
    """``by_rank``: what each rank generated without the engine. ``outputs``: the engine's, by request."""

    by_rank: list[list[Generated]]
    outputs: dict[str, list[Output]]


def run_layout(reference: Reference, parallel: ParallelConfig, hosts: Hosts) -> Answer:
    """Ranks and, behind them, the leader, on the first host. Raises RankError where one of them fails."""
    num_ranks = parallel.num_ranks
    places = [*hosts.of_ranks(num_ranks), 0]
    *by_rank, outputs = run_ranks(
        _process,
        num_ranks + 1,
        str(reference.directory),
        parallel,
        [hosts.addresses[place] for place in places],
        reference.prompts,
        networks=[hosts.networks[place] for place in places] if hosts.networks else (),
        timeout_s=_TIMEOUT_S,
    )
    return Answer(by_rank, outputs)


def _process(
    context: RankContext, directory: str, parallel: ParallelConfig, addresses: list[str], prompts: list[list[int]]
) -> object:
    if context.rank == parallel.num_ranks:
        return _lead(context, directory, parallel, addresses, prompts)
    generated = _generate(context, directory, parallel, addresses[context.rank], prompts)
    serve_as_rank(context)
    return generated


def _generate(
    context: RankContext, directory: str, parallel: ParallelConfig, address: str, prompts: list[list[int]]
) -> list[Generated]:
    """The model alone, for its logits: no sampler shows those. Prompts in chunks while others decode; all dp groups
    do the same, for without an engine none could be idle in a step."""
    cpu = torch.device("cpu")
    mesh = init_distributed(parallel, context.rank, context.store, cpu, _TIMEOUT_S, address)
    model = build_model(ModelConfig.from_directory(directory), mesh, Dtype.FLOAT32, cpu)
    load_weights(model, directory)
    return generate_together(ModelDriver(model, mesh, torch.float32, store=context.store), prompts, NUM_NEW, chunk=7)


def _lead(
    context: RankContext, directory: str, parallel: ParallelConfig, addresses: list[str], prompts: list[list[int]]
) -> dict[str, list[Output]]:
    """All prompts, several times at once; and again, now that their beginnings are cached."""
    plan = small_plan(
        directory,
        tensor_parallel_size=parallel.tp,
        pipeline_parallel_size=parallel.pp,
        data_parallel_size=parallel.dp,
        expert_parallel_size=parallel.ep,
        max_num_seqs=_MAX_NUM_SEQS,
        max_num_batched_tokens=_MAX_NUM_BATCHED_TOKENS,
        depth=plans_in_flight("cpu", parallel.pp),
    )
    with leading(context, plan, addresses[-1], addresses[:-1], _BLOCK_SIZE) as served:
        return served.run(_requests("first", prompts * _NUM_COPIES)) | served.run(_requests("again", prompts))


def _requests(name: str, prompts: list[list[int]]) -> list[Request]:
    options = {"logprobs": MAX_LOGPROBS, "prompt_logprobs": 2} if name == "first" else {}
    return [make_request(f"{name}-{i}", prompt, **options) for i, prompt in enumerate(prompts)]


def largest_difference(reference: Reference, parallel: ParallelConfig, answer: Answer) -> float:
    """Of logits, and of the engine's log-probabilities, from those of transformers. Raises AssertionError where a
    greedy token differs, or an answer is missing."""
    first = (parallel.pp - 1) * parallel.dp * parallel.tp
    differences = [
        _of_logits(answer.by_rank[sampling_rank], reference.generated)
        for sampling_rank in range(first, parallel.num_ranks, parallel.tp)
    ]
    assert len(answer.outputs) == (_NUM_COPIES + 1) * len(reference.prompts)
    for name, outputs in answer.outputs.items():
        i = int(name.partition("-")[2]) % len(reference.prompts)
        generated, prompt = reference.generated[i], reference.prompts[i]
        assert tokens_of(outputs) == generated.token_ids[len(prompt) :], name
        if name.startswith("first"):
            differences.append(_of_logprobs(outputs, prompt, generated))
    again = [outputs[-1] for name, outputs in answer.outputs.items() if name.startswith("again")]
    assert any(output.num_cached_tokens for output in again), "no beginning was found in the cache"
    return max(differences)


def _of_logits(ours: Sequence[Generated], oracle: Sequence[Generated]) -> float:
    for mine, expected in zip(ours, oracle, strict=True):
        assert expected.logits.std() >= 1.0, "an absolute tolerance means little on smaller logits"
        assert mine.token_ids == expected.token_ids
    return max(float(np.abs(mine.logits - expected.logits).max()) for mine, expected in zip(ours, oracle, strict=True))


def _of_logprobs(outputs: list[Output], prompt: list[int], generated: Generated) -> float:
    """Of the likeliest tokens at each generated position, and of the prompt's own tokens."""
    logits = generated.logits.astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    steps = [entry for output in outputs for entry in output.logprobs or []]
    assert [len(entry.token_ids) for entry in steps] == [MAX_LOGPROBS] * NUM_NEW
    differences = [
        float(np.abs(expected[len(prompt) - 1 + step][entry.token_ids] - entry.logprobs).max())
        for step, entry in enumerate(steps)
    ]
    entries = [entry for output in outputs for entry in output.prompt_logprobs or []]
    assert len(entries) == len(prompt) and entries[0] is None
    for position, entry in enumerate(entries[1:], 1):
        assert entry is not None
        differences.append(abs(entry.logprob - float(expected[position - 1][prompt[position]])))
    return max(differences)
