"""A model on one device with a cache and requests whose blocks are given out beforehand, driven without an engine."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.attention.backend import AttentionBackend
from engine.attention.registry import attention_backend
from engine.batch import ForwardBatch
from engine.config import Dtype, LoadFormat
from engine.dtypes import torch_dtype
from engine.executor.kv_cache import allocate_kv_cache
from engine.executor.model_runner import CapturedSteps
from engine.executor.stage import run_stage
from engine.kv_groups import num_layer_slots
from engine.model_config import ModelConfig
from engine.models.registry import build_model
from engine.parallel.mesh import Mesh
from engine.weights.dummy import fill_with_random_values
from engine.weights.loader import load_weights

BLOCK_SIZE = 16


@dataclass(frozen=True)
class CacheShape:
    """Requests 0 … num_requests − 1, of at most ``max_len`` tokens."""

    num_requests: int
    max_len: int

    @property
    def blocks_per_request(self) -> int:
        return -(-self.max_len // BLOCK_SIZE)

    def num_blocks(self, num_groups: int) -> int:
        """Of all requests, and the one that nobody has."""
        return 1 + num_groups * self.num_requests * self.blocks_per_request


def cache_bytes(config: ModelConfig, shapes: Sequence[CacheShape], dtype: Dtype) -> int:
    """Of the cache of a GpuModel on one device."""
    groups = Mesh().kv_groups(config)
    block_numbers = 2 * num_layer_slots(groups) * BLOCK_SIZE * config.num_kv_heads * config.head_dim
    return max(shape.num_blocks(len(groups)) for shape in shapes) * block_numbers * torch_dtype(dtype).itemsize


class GpuModel:
    """``checkpoint``: None for random weights. ``shapes``: what steps may hold, one at a time. All are laid over the
    same blocks, so the cache is as large as the largest needs, and a step of one shape overwrites those of another."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: str | None,
        dtype: Dtype,
        device: torch.device,
        *,
        shapes: Sequence[CacheShape],
    ) -> None:
        self.config, self.mesh, self.device, self.shapes = config, Mesh(), device, shapes
        self.model = build_model(config, self.mesh, dtype, device)
        if checkpoint is None:
            fill_with_random_values(self.model.slices, self.model.conversions, lambda done, total: None)
        else:
            load_weights(self.model, checkpoint, LoadFormat.SAFETENSORS, lambda done, total: None)
        self.groups = self.mesh.kv_groups(config)
        num_blocks = max(shape.num_blocks(len(self.groups)) for shape in shapes)
        self.cache = allocate_kv_cache(
            config, self.mesh, num_blocks=num_blocks, block_size=BLOCK_SIZE, dtype=dtype, device=device
        )
        self.attention: AttentionBackend = attention_backend(device)
        self._tables = [self._table(shape) for shape in shapes]

    def _table(self, shape: CacheShape) -> torch.Tensor:
        """Every block once: groups share the pool."""
        blocks = torch.arange(1, shape.num_blocks(len(self.groups)), device=self.device)
        return blocks.view(len(self.groups), shape.num_requests, shape.blocks_per_request)

    def batch(self, starts: list[int], tokens: list[list[int]]) -> ForwardBatch:
        """Of the first requests, one entry each: tokens before the step, and those of the step. Of the first shape that
        it fits into; raises ValueError where there is none."""
        ends = [start + len(part) for start, part in zip(starts, tokens, strict=True)]
        lengths = torch.tensor([len(part) for part in tokens], device=self.device)
        positions = torch.cat([torch.arange(s, e, device=self.device) for s, e in zip(starts, ends, strict=True)])
        requests = torch.arange(len(tokens), device=self.device).repeat_interleave(lengths)
        fitting = [shape.num_requests >= len(tokens) and shape.max_len >= max(ends) for shape in self.shapes]
        tables = self._tables[fitting.index(True)][:, : len(tokens), : -(-max(ends) // BLOCK_SIZE)].contiguous()
        slots = tables[:, requests, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        return ForwardBatch(
            token_ids=torch.tensor([token for part in tokens for token in part], device=self.device),
            positions=positions,
            query_lens=tuple(len(part) for part in tokens),
            kv_lens=tuple(ends),
            block_tables=tuple(tables),
            slot_mapping=tuple(slots),
            logits_rows=lengths.cumsum(0) - 1,
            prompt_lens=tuple(ends),
        )

    @torch.inference_mode()
    def logits(self, batch: ForwardBatch, captured: CapturedSteps | None = None) -> torch.Tensor:
        """[requests, vocab] of each request's last token."""
        hidden = None if captured is None else captured.forward(batch)
        if hidden is None:
            step = self.attention.plan(batch, self.groups, BLOCK_SIZE)
            hidden = run_stage(self.model, self.mesh, batch, self.cache, step)
        logits = self.model.logits(hidden[batch.logits_rows])
        assert logits is not None
        return logits

    def capture(self) -> CapturedSteps:
        """Graphs of decoding steps of the first shape. On CUDA only."""
        from engine.executor.cuda_graphs import DecodeGraphs

        return DecodeGraphs(
            self.model,
            self.cache,
            self.attention,
            self.groups,
            max_num_seqs=self.shapes[0].num_requests,
            max_model_len=self.shapes[0].max_len,
            device=self.device,
        )
