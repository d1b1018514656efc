"""Deterministic mode through the real scheduler and sampler: tokens and log-probabilities of one request."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from engine.config import CacheConfig, Determinism, Dtype, ParallelConfig, SchedulerConfig
from engine.deterministic import deterministic_layout
from engine.engine import Engine
from engine.executor.in_process import InProcessExecutor
from engine.executor.worker_config import WorkerConfig
from engine.model_config import ModelConfig, kv_groups
from engine.request import Request, SamplingParams, TopLogprobs

TINY = Path(__file__).parents[2] / "engine/assets/remuda-tiny"
PROMPT = [(7 * i * i + 3) % 400 for i in range(150)]
SAMPLINGS = (
    SamplingParams(12, temperature=0.0, logprobs=3, prompt_logprobs=1),
    SamplingParams(12, seed=5, temperature=0.9, top_p=0.8, top_k=40, presence_penalty=0.5, logprobs=3),
    SamplingParams(12, seed=5, choice=1, temperature=1.2, min_p=0.01, repetition_penalty=1.2, logprobs=2),
)


Answer = tuple[list[int], list[TopLogprobs]]


@dataclass
class Bed:
    """An engine and what it said: of each request tokens, and log-probabilities."""

    engine: Engine
    executor: InProcessExecutor

    def run(self, requests: list[tuple[str, list[int], SamplingParams]]) -> dict[str, Answer]:
        found: dict[str, Answer] = {name: ([], []) for name, _, _ in requests}
        for name, prompt, sampling in requests:
            self.engine.add(Request(name, prompt, len(prompt), sampling))
        while self.engine.has_work:
            for output in self.engine.step():
                token_ids, logprobs = found[output.request_id]
                token_ids += output.token_ids
                logprobs += output.logprobs or []
        return found


def make_bed(dtype: Dtype, budget: int, *, keeps_prefixes: bool) -> Bed:
    model = ModelConfig.from_directory(TINY)
    layout = deterministic_layout(model, ParallelConfig(), Determinism.D1)
    executor = InProcessExecutor(
        WorkerConfig(
            rank=0,
            channel_address="",
            secret="",
            model=str(TINY),
            dtype=dtype,
            determinism=layout.determinism,
            max_num_seqs=8,
            max_num_batched_tokens=budget,
            kv_cache_memory_bytes=2**24,
        )
    )
    cache = executor.ready.cache
    engine = Engine(
        executor=executor,
        kv_groups=kv_groups(model),
        vocab_size=model.vocab_size,
        scheduler_config=SchedulerConfig(8, budget, executor.ready.max_model_len),
        cache_config=CacheConfig(cache.block_size, cache.num_blocks, keeps_prefixes),
    )
    return Bed(engine, executor)


@pytest.mark.parametrize("dtype", list(Dtype))
def test_neither_batch_nor_chunks_nor_a_prefix_hit_change_a_request(dtype: Dtype) -> None:
    alone = make_bed(dtype, 512, keeps_prefixes=False)
    try:
        expected = [alone.run([("target", PROMPT, sampling)])["target"] for sampling in SAMPLINGS]
    finally:
        alone.executor.close()
    mixed = make_bed(dtype, 48, keeps_prefixes=True)
    try:
        mixed.run([("earlier", PROMPT[:100] + [1, 2, 3], SamplingParams(3, temperature=0.0))])
        others = [[(i * j) % 300 for j in range(9 + 13 * i)] for i in range(4)]
        crowd = [(f"crowd {i}", other, SamplingParams(20, seed=i)) for i, other in enumerate(others)]
        targets = [(f"target {i}", PROMPT, sampling) for i, sampling in enumerate(SAMPLINGS)]
        found = mixed.run([*crowd[:2], *targets, *crowd[2:]])
        assert mixed.engine._schedulers[0].num_tokens_cached > 0
    finally:
        mixed.executor.close()
    assert [found[name] for name, _, _ in targets] == expected
