"""Collectives between real ranks: sums, gathers, broadcasts, and what survivors see when a peer is gone."""

import datetime
import os
import time
from typing import Any

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
# Below and above the size to which copies are exchanged in full; divisible by the ranks and not.
SHAPES = [(1,), (3, 5), (7, 64), (512, 256), (257, 257)]


KINDS = pytest.mark.parametrize("kind", [SharedMemoryCollectives, GlooCollectives])


def mesh_of(context: RankContext, kind: type, timeout_s: float = 20.0) -> tuple[int, Collectives]:
    """Ranks with one address share a host, and so memory; those with several do not."""
    parallel = ParallelConfig(tp=context.num_ranks)
    address = "127.0.0.1" if kind is SharedMemoryCollectives else f"127.0.0.{context.rank + 1}"
    mesh = init_distributed(parallel, context.rank, context.store, torch.device("cpu"), timeout_s, address)
    assert isinstance(mesh.tp, kind)
    return context.rank, mesh.tp


def contribution(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank)).to(dtype)


def all_operations(context: RankContext, kind: type, dtype: torch.dtype) -> dict[str, Any]:
    rank, tp = mesh_of(context, kind)
    assert (tp.rank, tp.size) == (rank, context.num_ranks)
    sums = [tp.all_reduce(contribution(rank, shape, dtype)) for shape in SHAPES]
    assert all(result.dtype is dtype for result in sums)
    transposed = tp.all_reduce(contribution(rank, (6, 4), dtype).T)
    gathered = tp.gather_last_dim(contribution(rank, (5, 3), dtype))
    gathered_by_all = tp.all_gather_last_dim(contribution(rank, (4, 6), dtype)[:, 1:4])
    token_ids = tp.broadcast(torch.arange(4) + 100 * rank)
    return {
        "sums": [result.double().numpy() for result in sums],
        "transposed": transposed.double().numpy(),
        "gathered": None if gathered is None else gathered.double().numpy(),
        "gathered_by_all": gathered_by_all.double().numpy(),
        "broadcast": token_ids.tolist(),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@KINDS
def test_operations(kind: type, num_ranks: int, dtype: torch.dtype) -> None:
    results = run_ranks(all_operations, num_ranks, kind, dtype)
    tolerance = 1e-5 if dtype is torch.float32 else 0.05
    for i, shape in enumerate(SHAPES):
        expected = sum(contribution(rank, shape, dtype).double() for rank in range(num_ranks))
        for result in results:
            assert np.array_equal(result["sums"][i], results[0]["sums"][i]), "ranks must agree to the bit"
            np.testing.assert_allclose(result["sums"][i], expected, rtol=tolerance, atol=tolerance)
    expected = sum(contribution(rank, (6, 4), dtype).T.double() for rank in range(num_ranks))
    np.testing.assert_allclose(results[-1]["transposed"], expected, rtol=tolerance, atol=tolerance)
    parts = [contribution(rank, (5, 3), dtype).double() for rank in range(num_ranks)]
    assert np.array_equal(results[0]["gathered"], np.concatenate(parts, axis=-1))
    assert all(result["gathered"] is None for result in results[1:])
    parts = [contribution(rank, (4, 6), dtype)[:, 1:4].double() for rank in range(num_ranks)]
    assert all(np.array_equal(result["gathered_by_all"], np.concatenate(parts, axis=-1)) for result in results)
    assert all(result["broadcast"] == [0, 1, 2, 3] for result in results)


def reduce_without_last_rank(context: RankContext, kind: type, leave: str, timeout_s: float) -> tuple[float, str]:
    """How long the survivors waited, and what they were told."""
    rank, tp = mesh_of(context, kind, timeout_s)
    tp.all_reduce(torch.ones(8))
    if rank == context.num_ranks - 1:
        if leave == "die":
            os._exit(1)
        context.store.get("the others have given up")
        return 0.0, ""
    start = time.monotonic()
    try:
        tp.all_reduce(torch.ones(8))
    except RankFailure as error:
        return time.monotonic() - start, str(error)
    finally:
        if rank == 0:
            context.store.set("the others have given up", "yes")
    raise AssertionError("the missing rank was not noticed")


@KINDS
def test_a_dead_peer_is_noticed_at_once(kind: type) -> None:
    survivor, dead = run_ranks(reduce_without_last_rank, 2, kind, "die", 30.0, allow_errors=True)
    assert isinstance(dead, AssertionError)
    assert survivor[0] < 10.0
    if kind is SharedMemoryCollectives:
        assert "rank 1 of the axis has died" in survivor[1]


@KINDS
def test_a_silent_peer_is_noticed_after_the_timeout(kind: type) -> None:
    waited, message = run_ranks(reduce_without_last_rank, 2, kind, "hang", 1.5)[0]
    assert 1.0 < waited < 10.0
    if kind is SharedMemoryCollectives:
        assert message == "all-reduce 1 failed: rank 1 of the axis did not reach it within 1.5 s"


class LateWork:
    """A gloo operation whose waiter, when its time is up, gets no processor before the operation has completed."""

    def __init__(self, work: Any, store: torch.distributed.Store) -> None:
        self._work, self._store = work, store
        self.is_completed = work.is_completed

    def wait(self, timeout: datetime.timedelta) -> None:
        try:
            self._work.wait(timeout)
        except RuntimeError:
            self._store.set("time is up", "yes")
            self._work.wait()
            raise


class LateGroup:
    def __init__(self, group: Any, store: torch.distributed.Store) -> None:
        self._group, self._store = group, store

    def alltoall_base(self, *arguments: Any) -> LateWork:
        return LateWork(self._group.alltoall_base(*arguments), self._store)


def reduce_late(context: RankContext) -> float:
    rank, tp = mesh_of(context, GlooCollectives)
    assert isinstance(tp, GlooCollectives)
    if rank == 0:
        tp = GlooCollectives(LateGroup(tp._group, context.store), rank, tp.size, 20.0)
    else:
        context.store.get("time is up")
    return tp.all_reduce(torch.ones(1)).item()


def test_an_operation_that_completes_as_the_time_of_a_slice_is_up() -> None:
    assert run_ranks(reduce_late, 2) == [2.0, 2.0]


def random_operations(context: RankContext, seed: int) -> bool:
    """Many operations of random kind and size at random moments; every rank knows what must come out."""
    rank, tp = mesh_of(context, SharedMemoryCollectives)
    shared, own = np.random.default_rng(seed), np.random.default_rng(seed + 1 + rank)
    for number in range(300):
        length, dtype = int(10 ** shared.uniform(0, 5.5)), [torch.float32, torch.bfloat16][int(shared.integers(2))]
        values = [torch.full((length,), float(shared.integers(-8, 8)), dtype=dtype) for _ in range(tp.size)]
        if own.random() < 0.05:
            time.sleep(0.003)
        match int(shared.integers(3)):
            case 0:
                assert torch.equal(tp.all_reduce(values[rank].clone()), torch.stack(values).sum(0)), number
            case 1:
                assert torch.equal(tp.broadcast(values[rank].clone()), values[0]), number
            case 2:
                gathered = tp.gather_last_dim(values[rank])
                assert (gathered is None) == (rank != 0), number
                assert gathered is None or torch.equal(gathered, torch.cat(values)), number
    return True


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_any_order_of_operations_through_shared_memory(num_ranks: int, seed: int) -> None:
    assert all(run_ranks(random_operations, num_ranks, seed))


def without_library(context: RankContext) -> str:
    if context.rank == 1:
        vars(engine.parallel.shared_memory)["native_library"] = lambda: None
    parallel = ParallelConfig(tp=context.num_ranks)
    tp = init_distributed(parallel, context.rank, context.store, torch.device("cpu"), 20.0).tp
    return f"{type(tp).__name__} {tp.all_reduce(torch.ones(1)).item()}"


def test_a_rank_without_the_library_takes_all_to_gloo() -> None:
    assert run_ranks(without_library, 2) == ["GlooCollectives 2.0"] * 2


def meet_alone(context: RankContext) -> None:
    if context.rank == 0:
        mesh_of(context, SharedMemoryCollectives, timeout_s=1.5)


def test_ranks_that_do_not_meet_in_time() -> None:
    error, _ = run_ranks(meet_alone, 2, allow_errors=True)
    assert isinstance(error, RankFailure)
    assert "did not meet its gang within 1.5 s" in str(error)


def test_one_rank_needs_no_group() -> None:
    mesh = init_distributed(ParallelConfig(), 0, None, torch.device("cpu"))  # type: ignore[arg-type]
    assert isinstance(mesh.tp, LocalCollectives)
