"""Adapters come and go between the steps of a running engine, whose other requests do not notice."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config import Dtype, LoraConfig, SchedulerConfig
from engine.engine import Engine
from engine.errors import AdapterError, InvalidRequest
from engine.executor.in_process import InProcessExecutor
from engine.executor.process_gang import ProcessGang
from engine.executor.worker_config import WorkerConfig
from engine.model_config import ModelConfig, kv_groups
from engine.request import Pooling, Request, SamplingParams
from tests.lora.adapters import VOCAB_SIZE, oracle_embedding, oracle_logits
from tests.lora.mixed import Adapted

NUM_NEW = 12
PROMPT = [5, 17, 3, 88, 41]


class Served:
    """An engine whose steps are made one by one."""

    def __init__(self, made: Adapted, tp: int, **changes: Any) -> None:
        values: dict[str, Any] = {"dtype": Dtype.FLOAT32, "max_num_seqs": 4, "max_num_batched_tokens": 16}
        values |= {"block_size": 4, "kv_cache_memory_bytes": 2**20, "tp": tp}
        config = WorkerConfig(rank=0, channel_address="", secret="", model=str(made.base), **values | changes)
        self.executor = InProcessExecutor(config) if tp == 1 else ProcessGang(config)
        model = ModelConfig.from_directory(made.base)
        self.engine = Engine(
            executor=self.executor,
            kv_groups=kv_groups(model),
            vocab_size=VOCAB_SIZE,
            scheduler_config=SchedulerConfig(4, 16, self.executor.ready.max_model_len, depth=config.depth),
            cache_config=self.executor.ready.cache,
            lora_config=LoraConfig(max_loras=2),
        )
        self.tokens: dict[str, list[int]] = {}

    def add(self, name: str, adapter: str = "", max_tokens: int = NUM_NEW) -> None:
        sampling = SamplingParams(max_tokens, temperature=0.0)
        self.engine.add(Request(name, PROMPT, len(PROMPT), sampling, adapter=adapter))
        self.tokens[name] = []

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            for output in self.engine.step():
                assert output.error is None
                self.tokens[output.request_id] += output.token_ids
            self.engine.check_integrity()

    def until(self, future: "Future[Any]") -> Any:
        while not future.done():
            self.step()
        return future.result()

    def finish(self) -> dict[str, list[int]]:
        while self.engine.has_work:
            self.step()
        return self.tokens


def embedding(served: Served, name: str, adapter: str) -> np.ndarray:
    sampling = SamplingParams(0, pooling=Pooling.MEAN)
    served.engine.add(Request(name, PROMPT, len(PROMPT), sampling, adapter=adapter))
    outputs = [output for _ in range(4) if served.engine.has_work for output in served.engine.step()]
    assert outputs[-1].pooled is not None
    return np.frombuffer(outputs[-1].pooled, "<f4")


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    started: list[Served] = []

    def start(*arguments: Any, **changes: Any) -> Served:
        started.append(Served(*arguments, **changes))
        return started[-1]

    yield start
    for served in started:
        served.executor.close()


def greedy(base: Path, adapter: Path | None, count: int = NUM_NEW) -> list[int]:
    """By PEFT, which computes the whole text anew for each token."""
    token_ids = list(PROMPT)
    for _ in range(count):
        token_ids.append(int(np.argmax(oracle_logits(base, adapter, token_ids)[-1])))
    return token_ids[len(PROMPT) :]


@pytest.mark.parametrize(("name", "tp", "depth"), [("llama", 1, 3), ("llama4", 2, 1)])
def test_adapters_come_and_go(
    adapted: Callable[[str], Adapted], serve: Callable[..., Served], name: str, tp: int, depth: int, tmp_path: Path
) -> None:
    made = adapted(name)
    plain, first, second = (greedy(made.base, path) for path in (None, *made.adapters))
    assert plain != first != second != plain
    served = serve(made, tp, depth=depth)
    engine = served.engine
    served.add("before", max_tokens=40)
    served.step(3)
    loading = engine.load_adapter("first", str(made.adapters[0]))
    with pytest.raises(InvalidRequest, match="'first' is not loaded"):
        served.add("early", "first")
    assert engine.load_adapter("first", str(made.adapters[0])) is loading, "another front end may ask for it too"
    with pytest.raises(AdapterError, match="loaded already"):
        engine.load_adapter("first", str(made.adapters[1]))
    info = served.until(loading)
    assert engine.adapters == (info,) and info.num_bytes > 0
    served.add("a", "first")
    with pytest.raises(AdapterError, match="loaded already"):
        engine.load_adapter("first", str(made.adapters[0]))
    broken = engine.load_adapter("broken", str(tmp_path))
    with pytest.raises(AdapterError, match=r"adapter_config\.json does not exist"):
        served.until(broken)
    served.until(engine.load_adapter("second", str(made.adapters[1])))
    with pytest.raises(AdapterError, match="room for 2 adapters"):
        engine.load_adapter("third", str(made.adapters[1]))
    served.add("b", "second")
    served.add("plain")
    served.step(2)
    unloading = engine.unload_adapter("first")
    with pytest.raises(InvalidRequest, match="'first' is not loaded"):
        served.add("late", "first")
    served.step(2)
    assert not unloading.done(), "a request still has it"
    served.until(unloading)
    assert len(served.tokens["a"]) == NUM_NEW
    # The same slot, another adapter, under the old name.
    served.until(engine.load_adapter("first", str(made.adapters[1])))
    served.add("c", "first")
    tokens = served.finish()
    assert tokens["before"][:NUM_NEW] == plain and len(tokens["before"]) == 40
    assert (tokens["a"], tokens["b"], tokens["c"], tokens["plain"]) == (first, second, second, plain)
    for left in ("first", "second"):
        served.until(engine.unload_adapter(left))
    assert engine.adapters == () and not engine.has_work


def test_preemption_keeps_the_adapter(adapted: Callable[[str], Adapted], serve: Callable[..., Served]) -> None:
    """Few blocks, so that requests are computed again."""
    made = adapted("llama")
    served = serve(made, 1, kv_cache_memory_bytes=24 * 2 * 2 * 4 * 2 * 16 * 4)
    served.until(served.engine.load_adapter("first", str(made.adapters[0])))
    for index in range(4):
        served.add(f"r{index}", "first" if index % 2 else "", max_tokens=30)
    tokens = served.finish()
    assert served.engine.stats().num_preemptions > 0
    expected = {adapter: greedy(made.base, adapter, 30) for adapter in (None, made.adapters[0])}
    assert [tokens[f"r{index}"] for index in range(4)] == [expected[None], expected[made.adapters[0]]] * 2


def test_an_adapter_has_embeddings_of_its_own(adapted: Callable[[str], Adapted], serve: Callable[..., Served]) -> None:
    made = adapted("llama")
    served = serve(made, 1)
    served.until(served.engine.load_adapter("a", str(made.adapters[0])))
    for adapter, path in (("", None), ("a", made.adapters[0])):
        expected = oracle_embedding(made.base, path, PROMPT)
        np.testing.assert_allclose(embedding(served, f"of {adapter}", adapter), expected, rtol=0, atol=1e-4)
