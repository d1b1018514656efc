"""Greedy tokens are a function of the prompt alone: whatever the scheduler does with the others, with chunks, with
blocks and with what was there before."""

import itertools
from dataclasses import dataclass
from pathlib import Path

import pytest

from engine.config import Dtype, SchedulerConfig
from engine.engine import Engine
from engine.executor.in_process import InProcessExecutor
from engine.executor.worker_config import WorkerConfig
from engine.model_config import ModelConfig, kv_groups
from engine.request import Request, SamplingParams, Tenant
from tests.parity.architectures import make_reference
from tests.parity.reference import NUM_NEW, Reference

BLOCK_SIZE = 4
BLOCKS_OF_ALL = 400


@dataclass(frozen=True)
class Way:
    """One way to serve the same requests."""

    budget: int = 64
    depth: int = 1
    keeps_prefixes: bool = True
    num_blocks: int = BLOCKS_OF_ALL
    max_num_seqs: int = 8
    priorities: tuple[int, ...] = (0,)
    num_tenants: int = 1
    num_steps_between: int = 0
    """Steps between the arrivals of two requests."""

    def __str__(self) -> str:
        found = [f"{name}={value}" for name, value in vars(self).items() if value != getattr(Way(), name)]
        return " ".join(found) or "plain"


CHUNKS = [Way(budget, depth, keeps) for budget, depth, keeps in itertools.product((8, 13), (1, 2, 3), (True, False))]
SHORT_OF_BLOCKS = [
    Way(depth=depth, keeps_prefixes=keeps, num_blocks=26)
    for depth, keeps in itertools.product((1, 2, 3), (True, False))
]
MIXED = [
    Way(11, depth, True, blocks, seqs, (3, 0, -2, 1), 2)
    for depth, blocks, seqs in [(1, 30, 8), (2, 30, 8), (3, 30, 8), (2, 200, 2), (3, 200, 1)]
]
TENANTS = [Way(11, depth, True, blocks, 3, num_tenants=3) for depth, blocks in [(1, 30), (2, 30), (3, 200)]]


@pytest.fixture(scope="module", params=["llama3.1", "llama4-scout", "mistral"])
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_reference(request.param, tmp_path_factory.mktemp(request.param))


def serve(directory: Path, way: Way, prompts: list[list[int]], num_rounds: int) -> tuple[list[list[list[int]]], Engine]:
    """All prompts, round after round: their tokens, and the engine as it was left."""
    model = ModelConfig.from_directory(str(directory))
    config = WorkerConfig(
        rank=0,
        channel_address="",
        secret="",
        model=str(directory),
        dtype=Dtype.FLOAT32,
        max_num_seqs=way.max_num_seqs,
        max_num_batched_tokens=way.budget,
        block_size=BLOCK_SIZE,
        kv_cache_memory_bytes=way.num_blocks * block_bytes(model),
        depth=way.depth,
    )
    executor = InProcessExecutor(config)
    try:
        cache = executor.ready.cache
        assert cache.num_blocks == way.num_blocks
        engine = Engine(
            executor=executor,
            kv_groups=kv_groups(model),
            vocab_size=model.vocab_size,
            scheduler_config=SchedulerConfig(
                way.max_num_seqs, way.budget, executor.ready.max_model_len, depth=way.depth
            ),
            cache_config=type(cache)(cache.block_size, cache.num_blocks, way.keeps_prefixes),
        )
        return [run(engine, way, prompts) for _ in range(num_rounds)], engine
    finally:
        executor.close()


def block_bytes(model: ModelConfig) -> int:
    num_layers = len(kv_groups(model)[0].layers)
    return 2 * num_layers * BLOCK_SIZE * model.num_kv_heads * model.head_dim * 4


def run(engine: Engine, way: Way, prompts: list[list[int]]) -> list[list[int]]:
    tokens: list[list[int]] = [[] for _ in prompts]

    def step() -> None:
        for output in engine.step():
            tokens[int(output.request_id)] += output.token_ids

    for index, prompt in enumerate(prompts):
        sampling = SamplingParams(NUM_NEW, temperature=0.0)
        priority = way.priorities[index % len(way.priorities)]
        tenant = Tenant(f"tenant-{index % way.num_tenants}")
        engine.add(Request(str(index), prompt, len(prompt), sampling, priority, tenant=tenant))
        for _ in range(way.num_steps_between):
            if engine.has_work:
                step()
    while engine.has_work:
        step()
    engine.check_integrity()
    return tokens


@pytest.mark.parametrize("way", [Way(), *CHUNKS, *SHORT_OF_BLOCKS, *MIXED, *TENANTS], ids=str)
def test_greedy_tokens_are_those_of_transformers_in_every_way(reference: Reference, way: Way) -> None:
    """Each prompt comes twice in a round, and again in the next, when its blocks may still be there."""
    expected = [found.token_ids[-NUM_NEW:] for found in reference.generated] * 2
    rounds, engine = serve(reference.directory, way, reference.prompts * 2, num_rounds=2)
    assert rounds == [expected, expected]
    scheduler = engine._schedulers[0]
    if way in SHORT_OF_BLOCKS and all(group.is_full for group in engine._kv_groups):
        assert engine.stats().num_preemptions > 0
    if way.keeps_prefixes and way.num_blocks == BLOCKS_OF_ALL:
        assert scheduler.num_tokens_cached > 0
    if not way.keeps_prefixes:
        assert scheduler.num_tokens_cached == 0
