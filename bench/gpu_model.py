"""A model on one device with a cache and requests whose blocks are given out beforehand, driven without an engine."""

import torch

from engine.attention.backend import AttentionBackend
from engine.attention.registry import attention_backend
from engine.batch import ForwardBatch
from engine.config import Dtype, LoadFormat
from engine.executor.kv_cache import allocate_kv_cache
from engine.executor.model_runner import CapturedSteps
from engine.executor.stage import run_stage
from engine.model_config import ModelConfig
from engine.models.registry import build_model
from engine.parallel.mesh import Mesh
from engine.weights.dummy import fill_with_random_values
from engine.weights.loader import load_weights

BLOCK_SIZE = 16


class GpuModel:
    """``checkpoint``: None for random weights. Requests are 0 … num_requests − 1, of at most ``max_len`` tokens."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: str | None,
        dtype: Dtype,
        device: torch.device,
        *,
        num_requests: int,
        max_len: int,
    ) -> None:
        self.config, self.mesh, self.device = config, Mesh(), device
        self.num_requests, self.max_len = num_requests, max_len
        self.model = build_model(config, self.mesh, dtype, device)
        if checkpoint is None:
            fill_with_random_values(self.model.slices, self.model.conversions, lambda done, total: None)
        else:
            load_weights(self.model, checkpoint, LoadFormat.SAFETENSORS, lambda done, total: None)
        self.groups = self.mesh.kv_groups(config)
        width = -(-max_len // BLOCK_SIZE)
        num_blocks = 1 + len(self.groups) * num_requests * width
        self.cache = allocate_kv_cache(
            config, self.mesh, num_blocks=num_blocks, block_size=BLOCK_SIZE, dtype=dtype, device=device
        )
        self.attention: AttentionBackend = attention_backend(device)
        # Every block once: groups share the pool.
        self._tables = torch.arange(1, num_blocks, device=device).view(len(self.groups), num_requests, width)

    def batch(self, starts: list[int], tokens: list[list[int]]) -> ForwardBatch:
        """Of the first requests, one entry each: tokens before the step, and those of the step."""
        ends = [start + len(part) for start, part in zip(starts, tokens, strict=True)]
        lengths = torch.tensor([len(part) for part in tokens], device=self.device)
        positions = torch.cat([torch.arange(s, e, device=self.device) for s, e in zip(starts, ends, strict=True)])
        requests = torch.arange(len(tokens), device=self.device).repeat_interleave(lengths)
        tables = self._tables[:, : len(tokens), : -(-max(ends) // BLOCK_SIZE)].contiguous()
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
        """Graphs of decoding steps. On CUDA only."""
        from engine.executor.cuda_graphs import DecodeGraphs

        return DecodeGraphs(
            self.model,
            self.cache,
            self.attention,
            self.groups,
            max_num_seqs=self.num_requests,
            max_model_len=self.max_len,
            device=self.device,
        )
