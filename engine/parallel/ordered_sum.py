"""Sums over a divided dimension in one order, however the dimension is divided over ranks.

A dimension is cut into a canonical number of shards, a power of two, and their summands are added up in pairs, pairs of
pairs and so on, in float32. A rank has 1/2ⁿ of the shards, neighbouring ones: a whole branch of that tree, so it hands
on one number in place of its shards' and the sum comes out the same, bit for bit, on 1, 2 or 4 ranks.
"""

from collections.abc import Iterable

import torch

from engine.config import Determinism
from engine.parallel.collectives import Collectives
from engine.parallel.mesh import Mesh


def sum_over_ranks(summand: torch.Tensor, mesh: Mesh, dtype: torch.dtype) -> torch.Tensor:
    """The tensor-parallel ranks' summands [T, H] to their sum of format ``dtype``, on all of them. Under D2 summands
    are branches in float32, see above; under D1 they are added up in float32 in the order of ranks."""
    determinism, axis = mesh.config.determinism, mesh.tp
    if determinism is Determinism.D2:
        return reduce_branches(summand, axis).to(dtype)
    if determinism is Determinism.OFF or axis.size == 1:
        return axis.all_reduce(summand)
    gathered = axis.all_gather_last_dim(summand).unflatten(1, (axis.size, -1))
    total: torch.Tensor = gathered[:, 0].to(torch.float32, copy=True)
    for rank in range(1, axis.size):
        total += gathered[:, rank]
    return total.to(dtype)


def tree_sum(summands: Iterable[torch.Tensor]) -> torch.Tensor:
    """Of S tensors of one shape, S a power of two, in float32."""
    level = list(summands)
    if len(level) == 1:
        return level[0].float()
    while len(level) > 1:
        level = [torch.add(left, right.float()) for left, right in zip(level[0::2], level[1::2], strict=True)]
    return level[0]


def reduce_branches(branch: torch.Tensor, axis: Collectives) -> torch.Tensor:
    """Each rank's sum over its shards, [T, H] float32, to the sum over all shards, on all ranks. ``axis.size`` is a
    power of two."""
    if axis.size == 1:
        return branch
    gathered = axis.all_gather_last_dim(branch)
    return tree_sum(gathered.chunk(axis.size, dim=1))
