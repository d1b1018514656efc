"""Token embedding and output head, with the vocabulary divided over the tensor-parallel ranks.

The vocabulary is padded to a multiple of the number of ranks; rows beyond it are zero and their logits are cut off.
GGUF files hold embeddings and heads quantized, and ``--quantization int8`` makes such a head of one that is not the
embedding too; then a rank holds no rows beyond the vocabulary's.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from engine.kernels.fixed_linear import fixed_linear
from engine.kernels.linear import linear
from engine.parameter import ParameterBuilder
from engine.quantization.matrix import MatrixPart
from engine.quantization.registry import make_matrix
from engine.quantization_config import WeightFormat


@dataclass(frozen=True)
class _VocabPart(MatrixPart):
    """So many rows of a matrix from ``first_row``; ranks may hold different numbers of them."""

    first_row: int = 0
    num_rows: int = 0

    @property
    def local_outputs(self) -> int:
        return self.num_rows

    @property
    def start(self) -> tuple[int, int]:
        return self.first_row, 0


class VocabEmbedding(nn.Module):
    """Rows [rank × n, (rank + 1) × n) of the matrix [vocab_size, hidden_size], n = ⌈vocab_size / tp⌉."""

    def __init__(self, build: ParameterBuilder, name: str, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self._tp = build.mesh.tp
        self._vocab_size = vocab_size
        self._is_deterministic = build.mesh.config.is_deterministic
        self._num_rows = -(-vocab_size // build.tp.degree)
        self._first_row = min(build.tp.index * self._num_rows, vocab_size)
        self._num_real = min(self._num_rows, vocab_size - self._first_row)
        form = build.format_of(name)
        # In every other quantized form they are plain.
        self._is_quantized = form is not None and form.kind in (WeightFormat.GGUF, WeightFormat.ONLINE_INT8)
        if self._is_quantized:
            part = _VocabPart(name, vocab_size, hidden_size, first_row=self._first_row, num_rows=self._num_real)
            self.matrix = make_matrix(build, [part])
            return
        self.weight = build.empty(self._num_rows, hidden_size)
        real = self.weight[: self._num_real]
        self.weight[self._num_real :].zero_()
        build.fill(real, f"{name}.weight", (vocab_size, hidden_size), (self._first_row, 0))

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] int64 to [T, hidden_size], the same on all ranks."""
        if self._tp.size == 1:
            return self._lookup(token_ids)
        rows = token_ids - self._first_row
        is_elsewhere = (rows < 0) | (rows >= self._num_rows)
        embedded = self._lookup(rows.masked_fill(is_elsewhere, 0))
        return self._tp.all_reduce(embedded.masked_fill(is_elsewhere[:, None], 0))

    def logits(self, hidden_rows: torch.Tensor) -> torch.Tensor | None:
        """The same matrix as output head: [R, hidden_size] to [R, vocab_size] float32 on tp rank 0, None elsewhere."""
        gathered = self._tp.gather_last_dim(self._products(hidden_rows))
        return None if gathered is None else gathered[:, : self._vocab_size].float()

    def _lookup(self, rows: torch.Tensor) -> torch.Tensor:
        """[T] row numbers of this rank to [T, hidden_size]."""
        if not self._is_quantized:
            return functional.embedding(rows, self.weight)
        if self._num_real == 0:
            return torch.zeros(len(rows), self.matrix.num_inputs, dtype=self.matrix.dtype, device=rows.device)
        return self.matrix.rows(rows)

    def _products(self, hidden_rows: torch.Tensor) -> torch.Tensor:
        """[R, hidden_size] to [R, num_rows]."""
        if not self._is_quantized:
            return (fixed_linear if self._is_deterministic else linear)(hidden_rows, self.weight)
        products = self.matrix.forward(hidden_rows)
        num_missing = self._num_rows - self._num_real
        return functional.pad(products, (0, num_missing)) if num_missing else products
