"""Token embedding and output head, with the vocabulary divided over the tensor-parallel ranks.

The vocabulary is padded to a multiple of the number of ranks; rows beyond it are zero and their logits are cut off.
"""

import torch
from torch import nn
from torch.nn import functional

from engine.parameter import ParameterBuilder


class VocabEmbedding(nn.Module):
    """Rows [rank × n, (rank + 1) × n) of the matrix [vocab_size, hidden_size], n = ⌈vocab_size / tp⌉."""

    def __init__(self, build: ParameterBuilder, name: str, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self._tp = build.mesh.tp
        self._vocab_size = vocab_size
        self._num_rows = -(-vocab_size // build.tp.degree)
        self._first_row = min(build.tp.index * self._num_rows, vocab_size)
        num_real = min(self._num_rows, vocab_size - self._first_row)
        self.weight = build.empty(self._num_rows, hidden_size)
        self.weight[num_real:].zero_()
        build.fill(self.weight[:num_real], f"{name}.weight", (vocab_size, hidden_size), (self._first_row, 0))

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] int64 to [T, hidden_size], the same on all ranks."""
        if self._tp.size == 1:
            return functional.embedding(token_ids, self.weight)
        rows = token_ids - self._first_row
        is_elsewhere = (rows < 0) | (rows >= self._num_rows)
        embedded = functional.embedding(rows.masked_fill(is_elsewhere, 0), self.weight)
        return self._tp.all_reduce(embedded.masked_fill(is_elsewhere[:, None], 0))

    def logits(self, hidden_rows: torch.Tensor) -> torch.Tensor | None:
        """The same matrix as output head: [R, hidden_size] to [R, vocab_size] float32 on tp rank 0, None elsewhere."""
        gathered = self._tp.gather_last_dim(functional.linear(hidden_rows, self.weight))
        return None if gathered is None else gathered[:, : self._vocab_size].float()
