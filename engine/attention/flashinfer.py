"""Attention by FlashInfer (arXiv 2501.01005), where the package is installed. Chosen by ``--attention-backend
flashinfer`` only: it has not been run yet, its steps are not captured as graphs, and each is waited for (its plans are
copied from pinned memory that the next one overwrites). Written for FlashInfer 0.7.

A step in which every request has one token goes to its decode wrapper, any other as a whole to its prefill wrapper.
To FlashInfer each run of pages (engine.attention.page_runs) is a request of its own.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import flashinfer
import torch

from engine.attention.backend import KvCacheView, Rotation
from engine.attention.page_runs import page_runs
from engine.batch import ForwardBatch
from engine.config import KvGroupConfig
from engine.kernels.triton.rotate_and_write import Angles, rotate_and_write

_WORKSPACE_BYTES = 256 * 2**20
_LAYOUT = "NHD"


class FlashInferStepAttention:
    """A planned step; see StepAttention. A group's wrapper is planned when its first layer comes: only then are the
    heads known."""

    def __init__(self, batch: ForwardBatch, groups: Sequence[KvGroupConfig], block_size: int) -> None:
        self._batch = batch
        self._groups = groups
        self._block_size = block_size
        self._places = {layer: (g, s) for g, group in enumerate(groups) for s, layer in enumerate(group.layers)}
        self._wrappers: dict[int, Any] = {}

    def forward(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: KvCacheView,
        rotation: Rotation | None = None,
    ) -> torch.Tensor:
        group, slot = self._places[layer]
        key_cache, value_cache = kv_cache.key_cache[slot], kv_cache.value_cache[slot]
        angles = None if rotation is None else Angles(rotation.cos, rotation.sin, rotation.interleaved)
        slots = self._batch.slot_mapping[group].contiguous()
        query = rotate_and_write(query, key, value, key_cache, value_cache, slots, angles).contiguous()
        if group not in self._wrappers:
            self._wrappers[group] = self._plan(group, query, key_cache)
        output: torch.Tensor = self._wrappers[group].run(query, (key_cache, value_cache))
        return output

    def _plan(self, group: int, query: torch.Tensor, key_cache: torch.Tensor) -> Any:
        config, tables = self._groups[group], self._batch.block_tables[group]
        runs = list(page_runs(self._batch, config, self._block_size))
        page_starts = _running_sums(run.num_pages for run in runs)
        pages = torch.cat([tables[run.request, run.first_page : run.first_page + run.num_pages] for run in runs])
        last_page_lens = torch.tensor([run.last_page_len for run in runs], dtype=torch.int32)
        heads = query.shape[1], key_cache.shape[2], query.shape[2]
        options = {
            "window_left": -1 if config.window_size is None else config.window_size - 1,
            "q_data_type": query.dtype,
            "kv_data_type": key_cache.dtype,
        }
        cache_pages = page_starts, pages.to(torch.int32), last_page_lens
        workspace = _workspace(query.device, group)
        if all(query_len == 1 for query_len in self._batch.query_lens):
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, _LAYOUT, use_tensor_cores=True)
            wrapper.plan(*cache_pages, *heads, self._block_size, **options)
            return wrapper
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, _LAYOUT)
        token_starts = _running_sums(run.num_tokens for run in runs)
        wrapper.plan(token_starts, *cache_pages, *heads, self._block_size, causal=True, **options)
        return wrapper


class FlashInferAttention:
    """See AttentionBackend."""

    def plan(self, batch: ForwardBatch, groups: Sequence[KvGroupConfig], block_size: int) -> FlashInferStepAttention:
        """Raises ValueError where a chunk does not begin with a block."""
        for group in groups:
            if group.chunk_size is not None and group.chunk_size % block_size:
                raise ValueError(f"chunks of {group.chunk_size} positions do not begin with a block of {block_size}")
        return FlashInferStepAttention(batch, groups, block_size)


def _running_sums(counts: Iterable[int]) -> torch.Tensor:
    """[n + 1] int32 on the host, where FlashInfer plans."""
    sums = [0]
    for count in counts:
        sums.append(sums[-1] + count)
    return torch.tensor(sums, dtype=torch.int32)


@functools.cache
def _workspace(device: torch.device, group: int) -> torch.Tensor:
    """Of a group's wrapper: plans of several groups live side by side in a step."""
    return torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
