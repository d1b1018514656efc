"""Attention of a prompt's tokens on CPU without a mask, on bounded scratch memory however long the context is.

n tokens of one request see every position before them and, among themselves, those up to their own. torch's CPU kernel
computes both parts without a mask and says each row's log-sum-exp, with which parts are put together as in
flash-decoding's reduction over splits (Dao et al. 2023).
"""

import torch

_MAX_PIECE_POSITIONS = 16384
"""Keys and values gathered from their pages at once."""


def attend_in_pieces(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor
) -> torch.Tensor:
    """Args:
        query: [n, h, d]; h is a multiple of k.
        keys, values: [rows, k, d].
        slots: [L] int64, where the key of each visible position lies; the last n are the queries' own.

    Returns:
        [n, h, d].
    """
    # A KV head's query heads stand beside each other and share its keys without a copy.
    grouped = query.unflatten(1, (keys.shape[1], -1)).permute(1, 2, 0, 3)
    num_before = len(slots) - len(query)
    merged, total = _attend(grouped, keys, values, slots[num_before:], is_causal=True)
    for first in range(0, num_before, _MAX_PIECE_POSITIONS):
        piece = slots[first : min(first + _MAX_PIECE_POSITIONS, num_before)]
        attended, weight = _attend(grouped, keys, values, piece, is_causal=False)
        both = torch.logaddexp(total, weight)
        merged = merged * (total - both).exp_().unsqueeze(-1) + attended * (weight - both).exp_().unsqueeze(-1)
        total = both
    return merged.to(query.dtype).permute(2, 0, 1, 3).flatten(1, 2)


def _attend(
    grouped: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, *, is_causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """[k, g, n, d] queries. Their attention over ``slots``, and its log-sum-exp [k, g, n] float32."""
    shape = (-1, grouped.shape[1], -1, -1)
    gathered_keys = keys.index_select(0, slots).transpose(0, 1)[:, None].expand(shape)
    gathered_values = values.index_select(0, slots).transpose(0, 1)[:, None].expand(shape)
    attended, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        grouped, gathered_keys, gathered_values, 0.0, is_causal
    )
    return attended, log_sum
