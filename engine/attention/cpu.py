"""Attention on CPUs with tile units, by native kernels that read the paged cache in place: one for decoding requests,
one for prompts."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from engine.attention.backend import AttentionBackend, KvCacheView, Rotation, StepAttention
from engine.attention.fixed import FixedAttention
from engine.attention.reference import ReferenceAttention
from engine.batch import ForwardBatch
from engine.config import KvGroupConfig
from engine.kernels.decode_attention import DecodeRequests, can_attend, decode_attention
from engine.kernels.decoder_layer import NativeAttended
from engine.kernels.prompt_attention import Prompts, prompt_attention
from engine.kernels.rotate_and_write import rotate_and_write


@dataclass(frozen=True)
class _GroupPlan:
    """One KV group's share of a step."""

    config: KvGroupConfig
    slot_mapping: torch.Tensor
    block_tables: torch.Tensor
    decodes: DecodeRequests | None
    prompts: Prompts | None


class CpuStepAttention:
    """A planned step; see StepAttention."""

    def __init__(self, plans: list[_GroupPlan], places: dict[int, tuple[int, int]]) -> None:
        self._plans = plans
        self._places = places
        self._native: dict[int, NativeAttended] = {}

    def native(self, layer: int, kv_cache: KvCacheView) -> tuple[NativeAttended, int]:
        """For native layers: what this one attends to, and its slot in the cache."""
        group, slot = self._places[layer]
        if group not in self._native:
            self._native[group] = _native(self._plans[group], kv_cache.key_cache[0].shape[1])
        return self._native[group], slot

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
        plan = self._plans[group]
        key_cache, value_cache = kv_cache.key_cache[slot], kv_cache.value_cache[slot]
        query = _write(query, key, value, key_cache, value_cache, plan.slot_mapping, rotation)
        output = torch.empty_like(query)
        if plan.prompts is not None:
            prompt_attention(
                query,
                output,
                key_cache,
                value_cache,
                plan.block_tables,
                plan.prompts,
                chunk_size=plan.config.chunk_size,
                window_size=plan.config.window_size,
            )
        if plan.decodes is not None:
            decode_attention(query, output, key_cache, value_cache, plan.block_tables, plan.decodes)
        return output


def _write(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    rotation: Rotation | None,
) -> torch.Tensor:
    """Turned keys, and values, to the cache; returns the turned queries, contiguous."""
    angles = None if rotation is None else (rotation.cos, rotation.sin)
    interleaved = rotation is not None and rotation.interleaved
    turned = rotate_and_write(query, key, value, key_cache, value_cache, slots, angles, interleaved=interleaved)
    if turned is not None:
        return turned
    if rotation is not None:
        query, key = rotation.apply(query), rotation.apply(key)
    key_cache.flatten(0, 1).index_copy_(0, slots, key)
    value_cache.flatten(0, 1).index_copy_(0, slots, value)
    return query.contiguous()


class _EitherStep:
    """Whichever of the two the first layer's tensors allow. All layers' are alike.

    ``is_fixed``: both are such that a token's result is its own alone; the kernel for prompts takes all tokens then.
    """

    def __init__(
        self, batch: ForwardBatch, groups: Sequence[KvGroupConfig], block_size: int, *, is_fixed: bool = False
    ) -> None:
        self._batch, self._groups, self._block_size = batch, groups, block_size
        self._is_fixed = is_fixed
        self._step: StepAttention | None = None

    def forward(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: KvCacheView,
        rotation: Rotation | None = None,
    ) -> torch.Tensor:
        return self.chosen(query, kv_cache).forward(layer, query, key, value, kv_cache, rotation)

    def chosen(self, query: torch.Tensor, kv_cache: KvCacheView) -> StepAttention:
        if self._step is None:
            if can_attend(query, kv_cache.key_cache[0], only_prompts=self._is_fixed):
                self._step = _plan(self._batch, self._groups, only_prompts=self._is_fixed)
            else:
                others: AttentionBackend = FixedAttention() if self._is_fixed else ReferenceAttention()
                self._step = others.plan(self._batch, self._groups, self._block_size)
        return self._step


def native_step(attention: StepAttention, query: torch.Tensor, kv_cache: KvCacheView) -> CpuStepAttention | None:
    """The step as the native kernels see it; None where they do not take queries and a cache such as these."""
    step = attention.chosen(query, kv_cache) if isinstance(attention, _EitherStep) else attention
    return step if isinstance(step, CpuStepAttention) else None


def _native(plan: _GroupPlan, block_size: int) -> NativeAttended:
    prompts, decodes = plan.prompts, plan.decodes
    return NativeAttended(
        plan.slot_mapping.data_ptr(),
        plan.block_tables.data_ptr(),
        plan.block_tables.shape[1],
        block_size,
        plan.config.chunk_size or 0,
        plan.config.window_size or 0,
        *((None,) * 4 if prompts is None else (getattr(prompts, f.name).data_ptr() for f in fields(prompts))),
        0 if prompts is None else len(prompts.rows),
        *((None,) * 4 if decodes is None else (getattr(decodes, f.name).data_ptr() for f in fields(decodes))),
        0 if decodes is None else len(decodes.rows),
    )


class CpuAttention:
    """See AttentionBackend. Tensors that the kernel does not take (float32) go to the reference."""

    def plan(self, batch: ForwardBatch, groups: Sequence[KvGroupConfig], block_size: int) -> StepAttention:
        return _EitherStep(batch, groups, block_size)


class FixedCpuAttention:
    """See AttentionBackend. A token's result does not depend on what else is in the step, nor on whether it decodes."""

    def plan(self, batch: ForwardBatch, groups: Sequence[KvGroupConfig], block_size: int) -> StepAttention:
        return _EitherStep(batch, groups, block_size, is_fixed=True)


def _plan(batch: ForwardBatch, groups: Sequence[KvGroupConfig], *, only_prompts: bool) -> CpuStepAttention:
    places = {layer: (g, s) for g, group in enumerate(groups) for s, layer in enumerate(group.layers)}
    plans = [_plan_group(batch, g, group, only_prompts=only_prompts) for g, group in enumerate(groups)]
    return CpuStepAttention(plans, places)


def _plan_group(batch: ForwardBatch, group: int, config: KvGroupConfig, *, only_prompts: bool) -> _GroupPlan:
    decodes: list[tuple[int, int, int, int]] = []
    prompts: list[tuple[int, int, int, int]] = []
    row = 0
    for request, (query_len, kv_len) in enumerate(zip(batch.query_lens, batch.kv_lens, strict=True)):
        if query_len == 1 and not only_prompts:
            decodes.append((row, request, config.first_visible(kv_len - 1), kv_len))
        else:
            prompts.append((row, request, kv_len - query_len, query_len))
        row += query_len
    return _GroupPlan(
        config,
        batch.slot_mapping[group],
        batch.block_tables[group].contiguous(),
        DecodeRequests(*torch.tensor(decodes).t().contiguous()) if decodes else None,
        Prompts(*torch.tensor(prompts).t().contiguous()) if prompts else None,
    )
