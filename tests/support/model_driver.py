"""Drives a model through its paged KV cache without the engine: blocks in random order, whole or chunked prefill.

The pool starts full of NaN, and what is freed becomes NaN again, so a read of what a token must not see shows.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist

from engine.attention.backend import KvCacheView
from engine.attention.registry import attention_backend
from engine.batch import ForwardBatch, StepAdapters
from engine.config import Dtype, ParallelConfig
from engine.dtypes import torch_dtype
from engine.executor.stage import run_stage
from engine.kv_groups import num_layer_slots
from engine.messages import NULL_BLOCK
from engine.model_config import ModelConfig, num_local_kv_heads
from engine.models.registry import Model, build_model
from engine.parallel.distributed import init_distributed
from engine.parallel.mesh import Mesh
from engine.weights.loader import load_weights
from tests.support.rank_pool import RankContext

BLOCK_SIZE = 4


@dataclass
class Stream:
    """One request: its tokens, how many of them are in the cache, its block tables by group, and its adapter's slot."""

    token_ids: list[int]
    num_prompt_tokens: int
    num_computed: int = 0
    tables: list[list[int]] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    adapter: int = -1


class ModelDriver:
    """A pool, and steps over some of its sequences."""

    def __init__(
        self,
        model: Model,
        mesh: Mesh,
        dtype: torch.dtype,
        num_blocks: int = 256,
        seed: int = 0,
        store: dist.Store | None = None,
        block_size: int = BLOCK_SIZE,
    ) -> None:
        """``store``: of the gang, where stages must learn what the last has chosen."""
        self.block_size = block_size
        self.model, self.mesh, self.store = model, mesh, store
        self._num_chosen = 0
        self.groups = mesh.kv_groups(model.config)
        self.backend = attention_backend(is_deterministic=mesh.config.is_deterministic)
        heads = num_local_kv_heads(model.config, mesh.config)
        shape = (num_blocks, self.block_size, heads, model.config.head_dim)
        slots = range(num_layer_slots(self.groups))
        self.keys = tuple(torch.full(shape, torch.nan, dtype=dtype) for _ in slots)
        self.values = tuple(torch.full(shape, torch.nan, dtype=dtype) for _ in slots)
        for cache in (*self.keys, *self.values):
            cache[NULL_BLOCK] = 0
        order = torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(seed)) + 1
        self.free_blocks: list[int] = order.tolist()

    def add(self, token_ids: Sequence[int]) -> Stream:
        return Stream(list(token_ids), len(token_ids), tables=[[] for _ in self.groups])

    def step(self, work: list[tuple[Stream, int]]) -> None:
        """Compute the next ``n`` tokens of each sequence; all their logits are kept."""
        for sequence, count in work:
            self._allocate(sequence, sequence.num_computed + count)
        batch = self._batch(work)
        plan = self.backend.plan(batch, self.groups, self.block_size)
        hidden = run_stage(self.model, self.mesh, batch, KvCacheView(self.keys, self.values), plan)
        logits = self.model.logits(hidden[batch.logits_rows])
        row = 0
        for sequence, count in work:
            if logits is not None:
                sequence.logits.append(logits[row : row + count])
            row += count
            sequence.num_computed += count
            self._free_invisible(sequence)

    def append_greedy(self, sequences: list[Stream]) -> None:
        """Append the most likely token to each; tp rank 0 of the last stage chooses for all."""
        chosen = torch.zeros(len(sequences), dtype=torch.int64)
        if self.samples:
            chosen = torch.stack([sequence.logits[-1][-1].argmax() for sequence in sequences])
        for sequence, token_id in zip(sequences, self._shared(chosen).tolist(), strict=True):
            sequence.token_ids.append(token_id)

    @property
    def samples(self) -> bool:
        return self.mesh.tp_rank == 0 and self.mesh.is_last_stage

    def _shared(self, chosen: torch.Tensor) -> torch.Tensor:
        """What the sampling rank has chosen; in an engine the leader would pass it on."""
        if self.mesh.config.pp == 1:
            return self.mesh.tp.broadcast(chosen)
        assert self.store is not None
        self._num_chosen += 1
        key = f"chosen/{self.mesh.dp_rank}/{self._num_chosen}"
        if self.samples:
            self.store.set(key, json.dumps(chosen.tolist()))
        return torch.tensor(json.loads(self.store.get(key)))

    def release(self, sequence: Stream) -> None:
        for table in sequence.tables:
            self._give_back([block for block in table if block != NULL_BLOCK])

    def _allocate(self, sequence: Stream, num_tokens: int) -> None:
        for table in sequence.tables:
            while len(table) * self.block_size < num_tokens:
                table.append(self.free_blocks.pop())

    def _free_invisible(self, sequence: Stream) -> None:
        for group, table in zip(self.groups, sequence.tables, strict=True):
            first = 0
            if group.chunk_size is not None:
                first = sequence.num_computed // group.chunk_size * group.chunk_size // self.block_size
            if group.window_size is not None:
                first = max(0, sequence.num_computed - group.window_size + 1) // self.block_size
            gone = [block for block in table[:first] if block != NULL_BLOCK]
            table[: min(first, len(table))] = [NULL_BLOCK] * min(first, len(table))
            self._give_back(gone)

    def _give_back(self, blocks: list[int]) -> None:
        for cache in (*self.keys, *self.values):
            cache[blocks] = torch.nan
        self.free_blocks = blocks + self.free_blocks

    def _batch(self, work: list[tuple[Stream, int]]) -> ForwardBatch:
        positions = [torch.arange(s.num_computed, s.num_computed + n) for s, n in work]
        token_ids = [torch.tensor(s.token_ids)[p] for (s, _), p in zip(work, positions, strict=True)]
        tables, mappings = [], []
        for g in range(len(self.groups)):
            width = max(len(s.tables[g]) for s, _ in work)
            rows = [s.tables[g] + [NULL_BLOCK] * (width - len(s.tables[g])) for s, _ in work]
            table = torch.tensor(rows)
            tables.append(table)
            size = self.block_size
            mappings.append(torch.cat([table[i][p // size] * size + p % size for i, p in enumerate(positions)]))
        total = sum(n for _, n in work)
        return ForwardBatch(
            token_ids=torch.cat(token_ids),
            positions=torch.cat(positions),
            query_lens=tuple(n for _, n in work),
            kv_lens=tuple(s.num_computed + n for s, n in work),
            block_tables=tuple(tables),
            slot_mapping=tuple(mappings),
            logits_rows=torch.arange(total),
            prompt_lens=tuple(s.num_prompt_tokens for s, _ in work),
            adapters=StepAdapters.of([s.adapter for s, n in work for _ in range(n)], torch.device("cpu")),
        )


@dataclass(frozen=True)
class Generated:
    """Prompt and greedy tokens, and the logits [len(token_ids) - 1, vocab_size] at every position but the last."""

    token_ids: list[int]
    logits: np.ndarray


def generate_alone(driver: ModelDriver, prompts: list[list[int]], num_new: int) -> list[Generated]:
    """One sequence after the other, each prompt in one step."""
    results = []
    for prompt in prompts:
        sequence = driver.add(prompt)
        driver.step([(sequence, len(prompt))])
        driver.append_greedy([sequence])
        for _ in range(num_new - 1):
            driver.step([(sequence, 1)])
            driver.append_greedy([sequence])
        driver.release(sequence)
        results.append(sequence)
    return [_generated(driver, sequence) for sequence in results]


def generate_together(driver: ModelDriver, prompts: list[list[int]], num_new: int, chunk: int) -> list[Generated]:
    """All at once, prompts in chunks of ``chunk`` tokens while others decode; one joins in every step."""
    waiting = [driver.add(prompt) for prompt in prompts]
    live: list[Stream] = []
    order = list(waiting)
    while waiting or live:
        if waiting:
            live.append(waiting.pop(0))
        driver.step([(s, min(chunk, len(s.token_ids) - s.num_computed)) for s in live])
        ready = [s for s in live if s.num_computed == len(s.token_ids)]
        if ready:
            driver.append_greedy(ready)
        for s in [s for s in ready if len(s.token_ids) == s.num_prompt_tokens + num_new]:
            live.remove(s)
            driver.release(s)
    return [_generated(driver, sequence) for sequence in order]


def _generated(driver: ModelDriver, sequence: Stream) -> Generated:
    logits = torch.cat(sequence.logits).numpy() if driver.samples else np.empty(0, np.float32)
    return Generated(sequence.token_ids, logits)


def run_model(
    config: ModelConfig,
    directory: str,
    mesh: Mesh,
    dtype: Dtype,
    prompts: list[list[int]],
    num_new: int,
    store: dist.Store | None = None,
) -> dict[str, list[Generated]]:
    """Load a checkpoint and generate both ways. Alone, dp groups compute the prompts in different orders."""
    model = build_model(config, mesh, dtype, torch.device("cpu"))
    load_weights(model, directory)
    driver = ModelDriver(model, mesh, torch_dtype(dtype), store=store)
    first = mesh.dp_rank % len(prompts)
    alone = generate_alone(driver, prompts[first:] + prompts[:first], num_new)
    return {
        "alone": alone[len(prompts) - first :] + alone[: len(prompts) - first],
        "together": generate_together(driver, prompts, num_new, chunk=7),
    }


def run_rank(
    context: RankContext,
    directory: str,
    tp: int,
    ep: int,
    dtype: Dtype,
    prompts: list[list[int]],
    num_new: int,
    pp: int = 1,
    num_hosts: int = 1,
    dp: int = 1,
) -> dict[str, list[Generated]]:
    """``run_model`` as one rank of a gang; for ``run_ranks``. ``num_hosts``: over how many the stages and dp groups are
    spread; they are made of loopback addresses, and share no memory."""
    parallel = ParallelConfig(tp=tp, ep=ep, pp=pp, dp=dp)
    host = context.rank // tp * num_hosts // (pp * dp)
    mesh = init_distributed(
        parallel, context.rank, context.store, torch.device("cpu"), timeout_s=30.0, bind_address=f"127.0.0.{host + 1}"
    )
    config = ModelConfig.from_directory(directory)
    return run_model(config, directory, mesh, dtype, prompts, num_new, context.store)


def forced_logits(driver: ModelDriver, generated: Generated, num_prompt: int, chunk: int = 7) -> np.ndarray:
    """Logits [len(token_ids) - 1, vocab_size] of a given text: its prompt in chunks, then token by token. One rank."""
    stream = driver.add(generated.token_ids[:num_prompt])
    while stream.num_computed < num_prompt:
        driver.step([(stream, min(chunk, num_prompt - stream.num_computed))])
    for token_id in generated.token_ids[num_prompt:-1]:
        stream.token_ids.append(token_id)
        driver.step([(stream, 1)])
    return np.asarray(torch.cat(stream.logits).numpy())
