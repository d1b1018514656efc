"""From slots to the tensors of a forward pass."""

from collections.abc import Sequence

import numpy as np
import torch

from engine.batch import ForwardBatch, StepAdapters
from engine.kernels.host_copy import to_device_together
from engine.messages import NO_ADAPTER
from engine.slot_table import ScheduledSlot


def build_batch(
    scheduled: Sequence[ScheduledSlot], num_groups: int, block_size: int, device: torch.device
) -> ForwardBatch:
    """``logits_rows`` are the last rows of the slots that sample, in order. ``scheduled`` must not be empty.

    Block tables are padded with zero, which is NULL_BLOCK.
    """
    query_lens = tuple(share.num_tokens for share in scheduled)
    ends = np.cumsum(query_lens)
    kv_lens = tuple(share.start + share.num_tokens for share in scheduled)
    positions = np.concatenate([np.arange(end - count, end) for end, count in zip(kv_lens, query_lens, strict=True)])
    token_ids = [token_id for share in scheduled for token_id in share.token_ids]
    rows = np.repeat(np.arange(len(scheduled)), query_lens)
    width = -(-max(kv_lens) // block_size)
    tables, slot_mapping = [], []
    for group in range(num_groups):
        # Zeros cost nothing until they are written, so short requests beside a long one keep their rows short.
        table = np.zeros((len(scheduled), width), dtype=np.int64)
        for row, (share, kv_len) in enumerate(zip(scheduled, kv_lens, strict=True)):
            num_blocks = -(-kv_len // block_size)
            table[row, :num_blocks] = np.frombuffer(share.state.block_tables[group], np.int64, num_blocks)
        tables.append(table)
        slot_mapping.append(table[rows, positions // block_size] * block_size + positions % block_size)
    sampling_rows = [int(end) - 1 for share, end in zip(scheduled, ends, strict=True) if share.sample]
    vectors = [np.array(token_ids), positions.astype(np.int64), np.array(sampling_rows, dtype=np.int64)]
    on_device = to_device_together([*vectors, *slot_mapping, *tables], device)
    adapters = None
    if any(share.state.adapter != NO_ADAPTER for share in scheduled):
        slots = [share.state.adapter for share in scheduled for _ in range(share.num_tokens)]
        adapters = StepAdapters.of(slots, device)
    return ForwardBatch(
        token_ids=on_device[0],
        positions=on_device[1],
        query_lens=query_lens,
        kv_lens=kv_lens,
        block_tables=tuple(on_device[3 + num_groups :]),
        slot_mapping=tuple(on_device[3 : 3 + num_groups]),
        logits_rows=on_device[2],
        prompt_lens=tuple(share.state.num_prompt_tokens for share in scheduled),
        adapters=adapters,
    )
