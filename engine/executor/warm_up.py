"""The largest steps that can come, computed before they do: memory runs out now or never, and kernels are compiled."""

from collections.abc import Iterator, Sequence

import torch

from engine.attention.backend import AttentionBackend, KvCacheView
from engine.batch import ForwardBatch
from engine.executor.sampler import sample
from engine.executor.sampling_row import SamplingRow
from engine.executor.stage import run_stage
from engine.messages import NULL_BLOCK
from engine.models.registry import Model
from engine.parallel.mesh import Mesh
from engine.request import SamplingParams

_SCRATCH_BLOCK = 1
"""Where all pretended tokens put their keys and values."""
MIN_BLOCKS = _SCRATCH_BLOCK + 1
_MAX_DECODE_POSITIONS = 32768
"""Attention reads at most so many at once; more would take longer and no more memory."""


@torch.inference_mode()
def run_largest_steps(
    model: Model,
    mesh: Mesh,
    cache: KvCacheView,
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_model_len: int,
    attention: AttentionBackend,
    device: torch.device,
) -> None:
    """A prefill of as many tokens as a step may have, and a step in which every slot decodes and samples.

    All ranks of a gang must call it together. ``cache`` needs MIN_BLOCKS blocks.
    """
    block_size = cache.key_cache[0].shape[1]
    groups = mesh.kv_groups(model.config)
    for query_lens, kv_lens in _largest_steps(max_num_seqs, max_num_batched_tokens, max_model_len):
        batch = _pretended_batch(query_lens, kv_lens, len(groups), block_size, device)
        hidden = run_stage(model, mesh, batch, cache, attention.plan(batch, groups, block_size))
        logits = model.logits(hidden[batch.logits_rows])
        if logits is not None:
            sample(logits, _pretended_rows(len(query_lens)))
    for tensor in (*cache.key_cache, *cache.value_cache):
        tensor[_SCRATCH_BLOCK].zero_()


def _largest_steps(
    max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Of each request: tokens in the step, and positions valid after it."""
    whole, rest = divmod(max_num_batched_tokens, max_model_len)
    prefill = ([max_model_len] * whole + [rest] * (rest > 0))[:max_num_seqs]
    yield prefill, prefill
    context = max(1, min(max_model_len, _MAX_DECODE_POSITIONS // max_num_seqs))
    yield [1] * max_num_seqs, [context] * max_num_seqs


def _pretended_batch(
    query_lens: Sequence[int], kv_lens: Sequence[int], num_groups: int, block_size: int, device: torch.device
) -> ForwardBatch:
    ranges = [torch.arange(end - count, end) for count, end in zip(query_lens, kv_lens, strict=True)]
    positions = torch.cat(ranges).to(device)
    width = -(-max(kv_lens) // block_size)
    table = torch.full((len(kv_lens), width), _SCRATCH_BLOCK, device=device)
    for row, count in enumerate(kv_lens):
        table[row, -(-count // block_size) :] = NULL_BLOCK
    return ForwardBatch(
        token_ids=torch.zeros_like(positions),
        positions=positions,
        query_lens=tuple(query_lens),
        kv_lens=tuple(kv_lens),
        block_tables=(table,) * num_groups,
        slot_mapping=(_SCRATCH_BLOCK * block_size + positions % block_size,) * num_groups,
        logits_rows=torch.tensor(query_lens, device=device).cumsum(0) - 1,
        prompt_lens=tuple(kv_lens),
    )


def _pretended_rows(count: int) -> list[SamplingRow]:
    """The costliest options."""
    params = SamplingParams(max_tokens=1, top_p=0.9, top_k=50, min_p=0.01, repetition_penalty=1.1, logprobs=1)
    return [SamplingRow(slot, params, [0], 1) for slot in range(count)]
