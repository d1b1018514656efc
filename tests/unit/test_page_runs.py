"""Runs of pages: every token sees in them, causally from the end, what its layer lets it see."""

import pytest
import torch

from engine.attention.page_runs import page_runs
from engine.batch import ForwardBatch
from engine.config import KvGroupConfig

BLOCK_SIZE = 4
WORK = [(0, 9), (5, 1), (3, 20), (23, 2), (7, 1)]
"""Of each request: tokens before the step, and in it."""


@pytest.mark.parametrize(
    "group",
    [KvGroupConfig((0,)), KvGroupConfig((0,), chunk_size=8), KvGroupConfig((0,), window_size=6)],
    ids=["full", "chunked", "sliding"],
)
def test_every_token_sees_what_it_should(group: KvGroupConfig) -> None:
    empty = torch.empty(0, dtype=torch.int64)
    lens, ends = tuple(count for _, count in WORK), tuple(start + count for start, count in WORK)
    batch = ForwardBatch(empty, empty, lens, ends, (empty,), (empty,), empty)
    window = group.window_size or 10**9
    found = []
    for run in page_runs(batch, group, BLOCK_SIZE):
        assert 1 <= run.last_page_len <= BLOCK_SIZE
        first = run.first_page * BLOCK_SIZE
        length = (run.num_pages - 1) * BLOCK_SIZE + run.last_page_len
        for token in range(run.num_tokens):
            last = first + length - run.num_tokens + token
            found.append((run.request, max(first, last - window + 1), last))
    expected = [
        (request, group.first_visible(position), position)
        for request, (start, count) in enumerate(WORK)
        for position in range(start, start + count)
    ]
    assert found == expected
