"""Which pages the tokens of a step see, for kernels that know causal attention and windows but no chunks."""

from collections.abc import Iterator
from dataclasses import dataclass

from engine.batch import ForwardBatch
from engine.config import KvGroupConfig


@dataclass(frozen=True)
class PageRun:
    """Neighbouring tokens of one request: how many, and the pages [first_page, …) with the positions that they see,
    the last of them ``last_page_len`` full."""

    request: int
    num_tokens: int
    first_page: int
    num_pages: int
    last_page_len: int


def page_runs(batch: ForwardBatch, config: KvGroupConfig, block_size: int) -> Iterator[PageRun]:
    """Of all tokens of a step, in order: a request's are cut where chunks begin, so that all tokens of a run see from
    the same page on."""
    for request, (query_len, kv_len) in enumerate(zip(batch.query_lens, batch.kv_lens, strict=True)):
        start = kv_len - query_len
        while start < kv_len:
            chunk = config.chunk_size
            stop = kv_len if chunk is None else min(kv_len, (start // chunk + 1) * chunk)
            first_page = config.first_visible(start) // block_size
            end_page = -(-stop // block_size)
            yield PageRun(request, stop - start, first_page, end_page - first_page, stop - (end_page - 1) * block_size)
            start = stop
