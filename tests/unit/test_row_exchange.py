"""Rows from every rank to every rank: uneven counts, ranks without any, more than a buffer holds, and lost peers."""

import os
import time

import numpy as np
import pytest
import torch

import engine.parallel.shared_memory
from engine.config import ParallelConfig
from engine.errors import RankFailure
from engine.parallel.collectives import Collectives, LocalCollectives
from engine.parallel.distributed import GlooCollectives, init_distributed
from engine.parallel.shared_memory import SharedMemoryCollectives
from tests.support.rank_pool import RankContext, run_ranks

pytestmark = pytest.mark.timeout(90)

KINDS = pytest.mark.parametrize("kind", [SharedMemoryCollectives, GlooCollectives])


def stage_of(context: RankContext, kind: type, timeout_s: float = 20.0) -> Collectives:
    """Ranks with one address share a host, and so memory; those with several do not."""
    parallel = ParallelConfig(dp=context.num_ranks)
    address = "127.0.0.1" if kind is SharedMemoryCollectives else f"127.0.0.{context.rank + 1}"
    mesh = init_distributed(parallel, context.rank, context.store, torch.device("cpu"), timeout_s, address)
    assert isinstance(mesh.stage, kind) and isinstance(mesh.tp, LocalCollectives)
    return mesh.stage


def row_values(sender: int, receiver: int, count: int, width: int) -> torch.Tensor:
    """So that a row says where it belongs."""
    return torch.arange(count * width).reshape(count, width) * 64 + sender * 8 + receiver


def random_exchanges(context: RankContext, kind: type, seed: int, buffer_bytes: int) -> int:
    """Every rank knows what must come. Between two of them other operations use the same buffers."""
    engine.parallel.shared_memory._BUFFER_BYTES = buffer_bytes
    stage, size = stage_of(context, kind), context.num_ranks
    shared = np.random.default_rng(seed)
    num_rows = 0
    for number in range(60):
        counts = shared.integers(0, 40, (size, size))
        counts[shared.random((size, size)) < 0.3] = 0
        if number % 5 == 0:
            counts[shared.integers(size)] = 0
        if number % 7 == 0:
            counts[:, shared.integers(size)] = 0
        width, dtype = int(shared.integers(1, 30)), [torch.int64, torch.float32, torch.uint8][int(shared.integers(3))]
        sent = [row_values(context.rank, to, int(counts[context.rank, to]), width) for to in range(size)]
        expected = torch.from_numpy(counts[:, context.rank].copy()) if number % 3 == 0 else None
        rows = torch.cat(sent).to(dtype)
        wait = stage.post_rows(rows, torch.from_numpy(counts[context.rank].copy()), expected)
        received, received_counts = wait()
        assert received_counts.tolist() == counts[:, context.rank].tolist(), number
        parts = [row_values(sender, context.rank, int(counts[sender, context.rank]), width) for sender in range(size)]
        assert torch.equal(received, torch.cat(parts).to(dtype)), number
        if number % 4 == 0:
            assert stage.all_reduce(torch.ones(3)).tolist() == [size] * 3
        num_rows += len(received)
    return num_rows


@pytest.mark.parametrize("num_ranks", [2, 4])
@KINDS
def test_rows_arrive_once_and_in_order(kind: type, num_ranks: int, seed: int) -> None:
    totals = run_ranks(random_exchanges, num_ranks, kind, seed, 4 * 2**20)
    assert min(totals) > 0


def test_more_rows_than_a_buffer_holds(seed: int) -> None:
    """Rounds: the widest row takes an eighth of the buffer."""
    assert min(run_ranks(random_exchanges, 3, SharedMemoryCollectives, seed, 2048)) > 0


def test_one_rank_keeps_its_rows() -> None:
    rows, counts = LocalCollectives().post_rows(torch.ones(3, 2), torch.tensor([3]))()
    assert rows.tolist() == [[1, 1]] * 3 and counts.tolist() == [3]


def exchange_without_last_rank(context: RankContext, kind: type, leave: str, timeout_s: float) -> tuple[float, str]:
    """How long the survivors waited, and what they were told. The last rank is gone while its rows are awaited."""
    stage = stage_of(context, kind, timeout_s)
    counts = torch.ones(context.num_ranks, dtype=torch.int64)
    stage.post_rows(torch.ones(context.num_ranks, 4), counts)()
    if context.rank == context.num_ranks - 1:
        if leave == "die":
            os._exit(1)
        context.store.get("the others have given up")
        return 0.0, ""
    start = time.monotonic()
    try:
        stage.post_rows(torch.ones(context.num_ranks, 4), counts, counts)()
    except RankFailure as error:
        return time.monotonic() - start, str(error)
    finally:
        if context.rank == 0:
            context.store.set("the others have given up", "yes")
    raise AssertionError("the missing rank was not noticed")


@KINDS
def test_a_dead_peer_is_noticed_at_once(kind: type) -> None:
    *survivors, dead = run_ranks(exchange_without_last_rank, 3, kind, "die", 30.0, allow_errors=True)
    assert isinstance(dead, AssertionError)
    assert all(waited < 10.0 and "all-to-all" in message for waited, message in survivors)
    if kind is SharedMemoryCollectives:
        assert all("rank 2 of the axis has died" in message for _, message in survivors)


@KINDS
def test_a_silent_peer_is_noticed_after_the_timeout(kind: type) -> None:
    waited, message = run_ranks(exchange_without_last_rank, 2, kind, "hang", 1.5)[0]
    assert 1.0 < waited < 10.0 and "all-to-all" in message
    if kind is SharedMemoryCollectives:
        assert message == "all-to-all 1 failed: rank 1 of the axis did not reach it within 1.5 s"
