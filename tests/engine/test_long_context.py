"""A context of 131,000 tokens, end to end: the same tokens as transformers, found again by its prefix, and steps whose
cost at the leader and around the model does not grow with the context."""

import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from engine.config import Dtype, SchedulerConfig
from engine.engine import Engine
from engine.executor.in_process import InProcessExecutor
from engine.executor.worker_config import WorkerConfig
from engine.messages import StepPlan, StepResult, encode
from engine.model_config import ModelConfig, kv_groups
from engine.request import Output, Request, SamplingParams
from tests.support.long_context import MAX_POSITIONS, expected_tokens, make_checkpoint, make_prompt

NUM_PROMPT, NUM_NEW = 131_000, 24
MAX_NUM_BATCHED_TOKENS = 2048


class Watched:
    """An executor, and the sizes of the plans that went to it."""

    def __init__(self, executor: InProcessExecutor) -> None:
        self.executor = executor
        self.plan_bytes: list[int] = []

    def prepare(self, plan: StepPlan) -> None:
        self.executor.prepare(plan)

    def submit(self, plan: StepPlan) -> Future[list[StepResult]]:
        self.plan_bytes.append(len(encode(plan)))
        return self.executor.submit(plan)

    def close(self) -> None:
        self.executor.close()


class Bed:
    def __init__(self, directory: Path) -> None:
        config = WorkerConfig(
            rank=0,
            channel_address="",
            secret="",
            model=str(directory),
            dtype=Dtype.FLOAT32,
            max_num_seqs=4,
            max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
            block_size=16,
            kv_cache_memory_bytes=40 * 2**20,
            depth=2,
        )
        self.executor = Watched(InProcessExecutor(config))
        ready = self.executor.executor.ready
        assert ready.max_model_len == MAX_POSITIONS
        model = ModelConfig.from_directory(config.model)
        self.engine = Engine(
            executor=self.executor,
            kv_groups=kv_groups(model),
            vocab_size=model.vocab_size,
            scheduler_config=SchedulerConfig(4, MAX_NUM_BATCHED_TOKENS, ready.max_model_len, depth=2),
            cache_config=ready.cache,
        )
        self.num_added = 0

    def add(self, prompt: list[int], **options: float) -> None:
        params = SamplingParams(**{"max_tokens": NUM_NEW, "temperature": 0.0, "min_tokens": NUM_NEW} | options)  # type: ignore[arg-type]
        self.engine.add(Request(f"r{self.num_added}", prompt, len(prompt), params))
        self.num_added += 1

    def run(self, prompt: list[int], **options: float) -> tuple[list[int], int]:
        """Its tokens, and how many of the prompt's came from the cache."""
        self.add(prompt, **options)
        outputs: list[Output] = []
        while self.engine.has_work:
            outputs += self.engine.step()
        self.engine.check_integrity()
        assert self.engine.stats().num_blocks_used == 0
        return [token_id for output in outputs for token_id in output.token_ids], outputs[-1].num_cached_tokens

    def most_allocated_in_a_step(self, prompt: list[int], **options: float) -> int:
        """Bytes that Python and NumPy allocate, at leader and rank together, in the worst of ten decode steps."""
        self.add(prompt, **options)
        while not any(output.token_ids for output in self.engine.step()):
            pass
        self.engine.step()
        tracemalloc.start()
        try:
            peaks = []
            for _ in range(10):
                before = tracemalloc.get_traced_memory()[0]
                tracemalloc.reset_peak()
                self.engine.step()
                peaks.append(tracemalloc.get_traced_memory()[1] - before)
        finally:
            tracemalloc.stop()
        while self.engine.has_work:
            self.engine.step()
        return max(peaks)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("long")


@pytest.fixture(scope="module")
def expected(directory: Path) -> list[int]:
    return expected_tokens(make_checkpoint(directory), make_prompt(NUM_PROMPT), NUM_NEW)


@pytest.fixture(scope="module")
def bed(directory: Path, expected: list[int]) -> Iterator[Bed]:
    bed = Bed(directory)
    yield bed
    bed.executor.close()


def test_a_context_of_131000_tokens(bed: Bed, expected: list[int]) -> None:
    """What comes first fills the prefix cache for the rest; each of these takes its part of a second."""
    prompt = make_prompt(NUM_PROMPT)
    began_s = time.monotonic()
    assert bed.run(prompt) == (expected, 0)
    whole_s = time.monotonic() - began_s
    num_chunks = -(-NUM_PROMPT // MAX_NUM_BATCHED_TOKENS)
    assert len(bed.executor.plan_bytes) <= num_chunks + NUM_NEW + 1
    assert bed.executor.plan_bytes[0] < 5 * (NUM_PROMPT + MAX_NUM_BATCHED_TOKENS), "ids are sent once, with the first"
    assert max(bed.executor.plan_bytes[1:num_chunks]) < 1024 and max(bed.executor.plan_bytes[num_chunks:]) < 128

    bed.executor.plan_bytes.clear()
    began_s = time.monotonic()
    assert bed.run(prompt) == (expected, (NUM_PROMPT - 1) // 16 * 16)
    assert time.monotonic() - began_s < whole_s / 5
    assert len(bed.executor.plan_bytes) <= NUM_NEW + 1, "the prompt's rest is one step"


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.1, "presence_penalty": 0.1}], ids=["greedy", "penal"])
def test_a_step_at_the_end_of_a_long_context_copies_no_history(bed: Bed, options: dict[str, float]) -> None:
    prompt = make_prompt(NUM_PROMPT)
    short, long = prompt[:100], prompt
    block_table_bytes = 8 * (NUM_PROMPT // 16)
    at_100 = bed.most_allocated_in_a_step(short, **options)
    at_131000 = bed.most_allocated_in_a_step(long, **options)
    # The penalised have at most the vocabulary; the forward pass gets a copy of the block table; a list of the history
    # alone would be 8 bytes a token.
    vocabulary_bytes = 8 * 16 * 2048 if options else 0
    assert at_131000 - at_100 < 3 * block_table_bytes + vocabulary_bytes < 8 * NUM_PROMPT
