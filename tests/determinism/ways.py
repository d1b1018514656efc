"""Ways to compute one and the same request, and what came out of each, for comparison bit by bit."""

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import engine.kernels.native_library
from engine.config import Determinism, ParallelConfig
from engine.deterministic import deterministic_layout
from engine.dtypes import torch_dtype
from engine.model_config import ModelConfig
from engine.models.registry import build_model
from engine.parallel.distributed import init_distributed
from engine.parallel.mesh import Mesh
from engine.weights.loader import load_weights
from tests.support.model_driver import ModelDriver, Stream
from tests.support.rank_pool import RankContext, run_ranks

VOCAB_SIZE = 501
"""Odd, so that no number of ranks divides it."""
PROMPT_LENGTH = 203
NUM_NEW = 8
_BLOCK_SIZE = 16


@dataclass(frozen=True)
class Way:
    """``chunk``: tokens of the prompt in one step, 0 for all; one after another where there are several. ``others``:
    requests beside it that come, prefill, decode and go. ``restarts``: half-way its cache is lost, and everything so
    far becomes a prompt."""

    chunks: tuple[int, ...] = (0,)
    others: int = 0
    restarts: bool = False

    def __str__(self) -> str:
        size = "whole" if self.chunks == (0,) else "chunks of " + ", ".join(map(str, self.chunks))
        return f"{size}, {f'beside {self.others}' if self.others else 'alone'}{', restarted' * self.restarts}"


ALONE = Way()
WAYS = (
    ALONE,
    Way(others=5),
    Way((1,)),
    Way((16,)),
    Way((7, 64, 1, 33), others=3),
    Way((130,), others=9),
    Way(others=2, restarts=True),
    Way((5,), others=4, restarts=True),
)
PAIR = (ALONE, Way((7, 64, 1, 33), others=3, restarts=True))


@dataclass(frozen=True)
class Observed:
    """The request's tokens, and the logits [tokens - 1, vocab] from which they came; empty on ranks that do not
    sample."""

    token_ids: list[int]
    logits: np.ndarray


def observe(driver: ModelDriver, way: Way, prompt_length: int) -> list[Observed]:
    """Several where the way restarts: what was computed first, and what came after."""
    generator = random.Random(1)
    target = driver.add([generator.randrange(VOCAB_SIZE) for _ in range(prompt_length)])
    crowd = _Crowd(driver, way.others)
    sizes = [size or prompt_length + NUM_NEW for size in way.chunks]
    done: list[Observed] = []
    step = 0
    while len(target.token_ids) < prompt_length + NUM_NEW:
        count = min(sizes[step % len(sizes)], len(target.token_ids) - target.num_computed)
        crowd.step((target, count))
        if target.num_computed == len(target.token_ids):
            driver.append_greedy([target])
        step += 1
        if way.restarts and not done and len(target.token_ids) == prompt_length + NUM_NEW // 2:
            done.append(_observed(driver, target))
            driver.release(target)
            target = replace(driver.add(target.token_ids), num_prompt_tokens=prompt_length)
    driver.release(target)
    crowd.leave()
    return [*done, _observed(driver, target)]


def _observed(driver: ModelDriver, stream: Stream) -> Observed:
    logits = torch.cat(stream.logits).numpy() if driver.samples else np.empty((0, VOCAB_SIZE), np.float32)
    return Observed(list(stream.token_ids), logits)


class _Crowd:
    """Other requests, of all lengths, which prefill in pieces, decode and are replaced."""

    def __init__(self, driver: ModelDriver, size: int) -> None:
        self._driver, self._size = driver, size
        self._random = random.Random(f"{size} {driver.mesh.dp_rank}")
        self._live: list[Stream] = []

    def step(self, target: tuple[Stream, int]) -> None:
        """One step, with the target somewhere among them."""
        while len(self._live) < self._size:
            length = self._random.randrange(1, 70)
            self._live.append(self._driver.add([self._random.randrange(VOCAB_SIZE) for _ in range(length)]))
        work = [(s, min(self._random.randrange(1, 40), len(s.token_ids) - s.num_computed)) for s in self._live]
        work.insert(self._random.randrange(len(work) + 1), target)
        self._driver.step(work)
        for stream in [s for s in self._live if s.num_computed == len(s.token_ids)]:
            stream.token_ids.append(self._random.randrange(VOCAB_SIZE))
            if self._random.random() < 0.2:
                self._live.remove(stream)
                self._driver.release(stream)

    def leave(self) -> None:
        for stream in self._live:
            self._driver.release(stream)


@dataclass(frozen=True)
class Setting:
    """``native``: with the native library; else everything runs on torch alone. ``quantization``: while loading."""

    directory: str
    determinism: Determinism
    native: bool = True
    tp: int = 1
    ep: int = 1
    pp: int = 1
    dp: int = 1
    prompt_length: int = PROMPT_LENGTH
    quantization: str | None = None

    @property
    def num_ranks(self) -> int:
        return self.tp * self.pp * self.dp


def observe_gang(setting: Setting, ways: tuple[Way, ...], timeout_s: float = 120.0) -> dict[Way, list[Observed]]:
    """What the sampling rank of a gang of processes saw."""
    found = run_ranks(observe_on_rank, setting.num_ranks, setting, ways, timeout_s=timeout_s)
    sampling: dict[Way, list[Observed]] = found[setting.tp * setting.dp * (setting.pp - 1)]
    return sampling


def observe_on_rank(context: RankContext, setting: Setting, ways: tuple[Way, ...]) -> dict[Way, list[Observed]]:
    """One rank of a gang, for ``run_ranks``."""
    if not setting.native:
        native: Any = engine.kernels.native_library
        native._PATH = Path("/nowhere")
    torch.set_num_threads(1)
    config = ModelConfig.from_directory(setting.directory, setting.quantization)
    layout = ParallelConfig(tp=setting.tp, ep=setting.ep, pp=setting.pp, dp=setting.dp)
    parallel = deterministic_layout(config, layout, setting.determinism)
    device = torch.device("cpu")
    mesh = Mesh(parallel)
    if parallel.num_ranks > 1:
        mesh = init_distributed(parallel, context.rank, context.store, device, timeout_s=60.0)
    with torch.inference_mode():
        model = build_model(config, mesh, config.dtype, device)
        load_weights(model, setting.directory)
        driver = ModelDriver(model, mesh, torch_dtype(config.dtype), store=context.store, block_size=_BLOCK_SIZE)
        return {way: observe(driver, way, setting.prompt_length) for way in ways}


def first_difference(found: dict[Way, list[Observed]], expected: Observed) -> str | None:
    """Of the first way whose tokens or logits are not those expected; None where all are the same."""
    for way, observations in found.items():
        for observed in observations:
            count = len(observed.token_ids) - 1
            same_tokens = observed.token_ids == expected.token_ids[: count + 1]
            ours, theirs = observed.logits.view(np.int32), expected.logits[:count].view(np.int32)
            if same_tokens and np.array_equal(ours, theirs):
                continue
            positions = np.flatnonzero((ours != theirs).any(axis=1)) if ours.shape == theirs.shape else np.empty(0)
            first = f"logits from position {positions[0]} on ({len(positions)})" if len(positions) else "tokens"
            return f"{way}: {first} differ"
    return None
