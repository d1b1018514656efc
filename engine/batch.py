"""The tensors of one forward pass, built by the model runner from a step plan, read by models and attention."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ForwardBatch:
    """Scheduled tokens of all requests, one after another. T tokens, B requests, G KV groups.

    Shapes and dtypes (all on the model's device unless said otherwise):
        token_ids: [T] int64.
        positions: [T] int64, position of each token in its request.
        query_lens: B Python ints, tokens of each request in this step (sum T).
        kv_lens: B Python ints, positions valid after this step (start + query_len).
        block_tables: G tensors [B, max blocks] int64, padded with NULL_BLOCK.
        slot_mapping: G tensors [T] int64, where each token's key and value go: block id × block_size + offset.
        logits_rows: [R] int64, rows of [T] whose logits are wanted.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    block_tables: tuple[torch.Tensor, ...]
    slot_mapping: tuple[torch.Tensor, ...]
    logits_rows: torch.Tensor
    prompt_lens: tuple[int, ...] = ()
    """B Python ints, length of each request's prompt (its first ``num_prompt_tokens``, whatever was generated since).
    Read by dynamic NTK rotary embedding alone, whose frequencies depend on it; may be left out for other models."""
