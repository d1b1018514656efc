"""Decoding steps as CUDA graphs: one launch instead of a thousand, which on a fast GPU take longer than the work.

For each of some batch sizes the model's forward pass is captured once, on static inputs; a step copies its inputs
there, pads them to the next size and replays. Padded rows write no keys and read position 0 of the null block. Graphs
hold their communicator and the addresses of weights and cache, so they belong to one epoch: a rank that starts anew
captures anew. Embedding to final norm are in the graph; logits and sampling, whose shapes depend on the requests, are
not.
"""

from collections.abc import Sequence

import torch

from engine.attention.backend import AttentionBackend, KvCacheView
from engine.attention.cuda import CudaAttention
from engine.batch import ForwardBatch
from engine.config import KvGroupConfig
from engine.executor.decode_sizes import captured_sizes, size_for
from engine.kernels.gpu_experts import has_grouped_kernel
from engine.layers.experts import QuantizedExperts, StackedExperts
from engine.messages import NULL_BLOCK
from engine.models.registry import Model
from engine.parallel.mesh import Mesh
from engine.quantization.dense import DenseMatrix
from engine.quantization.fp8 import Float8Matrix
from engine.quantization.matrix import WeightMatrix
from engine.quantization.registry import MixedMatrix
from engine.rope_config import RopeType

_NO_SLOT = -1
_CAPTURABLE = (DenseMatrix, Float8Matrix, MixedMatrix)
"""Matrices whose products are known to launch the same kernels every time and to ask the host for nothing."""


def can_capture(model: Model, mesh: Mesh, attention: AttentionBackend, device: torch.device) -> bool:
    """Not where stages or data-parallel groups wait for one another, nor where a step's work depends on numbers of the
    host: dynamic rotary embedding, experts without kernels of their own, matrices that are decoded piece by piece."""
    assert isinstance(model, torch.nn.Module)
    return (
        device.type == "cuda"
        and isinstance(attention, CudaAttention)
        and mesh.config.pp == 1
        and mesh.config.dp == 1
        and model.config.rope.kind is not RopeType.DYNAMIC
        and all(_allows_capture(module) for module in model.modules())
    )


def _allows_capture(module: torch.nn.Module) -> bool:
    if isinstance(module, WeightMatrix):
        return isinstance(module, _CAPTURABLE)
    if isinstance(module, StackedExperts):
        return has_grouped_kernel(module.down_weights)
    return not isinstance(module, QuantizedExperts)


class DecodeGraphs:
    """The captured graphs of one rank in one epoch. Captures when it is made; all ranks of a gang must make theirs
    together, for collectives are captured too.

    Args:
        groups: the rank's KV groups.
        max_num_seqs: most requests of a step.
        max_model_len: longest context, for which attention is planned.
    """

    def __init__(
        self,
        model: Model,
        cache: KvCacheView,
        attention: AttentionBackend,
        groups: Sequence[KvGroupConfig],
        *,
        max_num_seqs: int,
        max_model_len: int,
        device: torch.device,
    ) -> None:
        self._model = model
        self._cache = cache
        self._attention = attention
        self._groups = groups
        self._block_size = cache.key_cache[0].shape[1]
        self._max_model_len = max_model_len
        self._sizes = captured_sizes(max_num_seqs)
        most = self._sizes[-1]
        width = -(-max_model_len // self._block_size)
        self._token_ids = torch.zeros(most, dtype=torch.int64, device=device)
        self._positions = torch.zeros(most, dtype=torch.int64, device=device)
        self._slots = [torch.full((most,), _NO_SLOT, dtype=torch.int64, device=device) for _ in groups]
        self._tables = [torch.full((most, width), NULL_BLOCK, dtype=torch.int64, device=device) for _ in groups]
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._capture(device)

    def forward(self, batch: ForwardBatch) -> torch.Tensor | None:
        """Hidden states [T, hidden_size], valid until the next step; None where no graph serves the batch."""
        size = size_for(len(batch.query_lens), self._sizes)
        if size is None or batch.adapters is not None or any(query_len != 1 for query_len in batch.query_lens):
            return None
        count = len(batch.query_lens)
        self._fill(batch, count, size)
        graph, hidden = self._graphs[size]
        graph.replay()
        return hidden[:count]

    def _fill(self, batch: ForwardBatch, count: int, size: int) -> None:
        inputs = [self._token_ids, self._positions, *self._slots]
        torch._foreach_copy_(
            [static[:count] for static in inputs], [batch.token_ids, batch.positions, *batch.slot_mapping]
        )
        for static, table in zip(self._tables, batch.block_tables, strict=True):
            # What lies beyond a request's length is not read, so what older steps left there may stay.
            static[:count, : table.shape[1]].copy_(table)
        if count < size:
            self._positions[count:size].zero_()
            for slots, tables in zip(self._slots, self._tables, strict=True):
                slots[count:size].fill_(_NO_SLOT)
                tables[count:size, 0].fill_(NULL_BLOCK)

    def _batch(self, size: int) -> ForwardBatch:
        return ForwardBatch(
            token_ids=self._token_ids[:size],
            positions=self._positions[:size],
            query_lens=(1,) * size,
            kv_lens=(self._max_model_len,) * size,
            block_tables=tuple(table[:size] for table in self._tables),
            slot_mapping=tuple(slots[:size] for slots in self._slots),
            logits_rows=self._positions[:0],
        )

    @torch.inference_mode()
    def _capture(self, device: torch.device) -> None:
        """Largest first: smaller graphs then find all their memory in the pool of the first."""
        stream = torch.cuda.Stream(device)
        pool = None
        for size in reversed(self._sizes):
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                self._forward(size)  # compiles kernels and makes workspaces, which cannot be done while capturing
            torch.cuda.current_stream(device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads of the process (NCCL's watchdog, the channel's) may go on calling CUDA.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                hidden = self._forward(size)
            pool = graph.pool()
            self._graphs[size] = graph, hidden
        torch.cuda.synchronize(device)

    def _forward(self, size: int) -> torch.Tensor:
        batch = self._batch(size)
        return self._model.forward(batch, self._cache, self._attention.plan(batch, self._groups, self._block_size))
