"""Whether a layout fits, what it can serve, and why not. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cluster.plan.devices import Machines
from cluster.plan.dispatch import DispatchChoice
from cluster.plan.rank_memory import PlanOptions, RankMemory, rank_memories
from engine.config import ParallelConfig
from engine.executor.cache_size import MIN_MODEL_LEN, longest_fitting
from engine.kv_groups import num_blocks_needed
from engine.models.shapes.model_shapes import ModelShapes


@dataclass(frozen=True)
class LayoutPlan:
    """A layout on machines. ``max_model_len``: tokens of the longest request, 0 where not even one fits.
    ``kv_tokens``: tokens that the cache holds in all layers at once, over all requests and dp groups.
    ``num_contexts``: requests of ``max_model_len`` that fit at once. ``reasons``: why it does not fit. ``dispatch``:
    why its form of expert parallelism was chosen; None where there was nothing to choose."""

    machines: Machines
    layout: ParallelConfig
    ranks: tuple[RankMemory, ...]
    max_model_len: int
    kv_tokens: int
    num_contexts: int
    reasons: tuple[str, ...]
    dispatch: DispatchChoice | None = None

    @property
    def fits(self) -> bool:
        return not self.reasons

    def num_held(self, length: int, block_size: int) -> int:
        """Requests of ``length`` tokens that the cache holds at once, over all dp groups."""
        return _num_held(self.ranks, self.layout, length, block_size)


def plan_layout(
    shapes: ModelShapes,
    layout: ParallelConfig,
    machines: Machines,
    options: PlanOptions,
    weights: Sequence[Mapping[str, int]],
) -> LayoutPlan:
    """``weights``: of every rank by kind (``weights_by_rank``)."""
    longest = shapes.config.max_context_len
    wanted, block_size = options.max_model_len, options.block_size
    # Block tables are as wide as the longest context, which is known only when they are counted.
    ranks = rank_memories(shapes, layout, machines, options, weights, wanted or MIN_MODEL_LEN)
    if wanted is None:
        ranks = rank_memories(shapes, layout, machines, options, weights, _fitting(ranks, block_size, longest))
    length = wanted or max(_fitting(ranks, block_size, longest), MIN_MODEL_LEN)
    reasons = tuple(_reasons(ranks, block_size, length))
    return LayoutPlan(
        machines=machines,
        layout=layout,
        ranks=tuple(ranks),
        max_model_len=0 if reasons else length,
        kv_tokens=layout.dp * min(rank.num_usable_blocks // len(rank.groups) * block_size for rank in ranks),
        num_contexts=_num_held(ranks, layout, length, block_size),
        reasons=reasons,
    )


def _num_held(ranks: Sequence[RankMemory], layout: ParallelConfig, length: int, block_size: int) -> int:
    return layout.dp * min(
        rank.num_usable_blocks // num_blocks_needed(rank.groups, length - 1, block_size) for rank in ranks
    )


def _fitting(ranks: Sequence[RankMemory], block_size: int, longest: int) -> int:
    """Tokens of the longest context that fits on every rank; 1 where none does."""
    # Ranks of a stage are alike.
    distinct = {(rank.groups, rank.num_usable_blocks) for rank in ranks}
    return min(longest_fitting(groups, block_size, num_usable, longest) for groups, num_usable in distinct)


def one_request_bytes(rank: RankMemory, length: int, block_size: int) -> int:
    """Of KV blocks for ``length`` tokens, with the one that is never handed out."""
    return (num_blocks_needed(rank.groups, length - 1, block_size) + 1) * rank.block_bytes


def _reasons(ranks: Sequence[RankMemory], block_size: int, length: int) -> Iterator[str]:
    """One for all ranks that lack the same, the worst first."""
    lacking: dict[tuple[int, str], list[int]] = {}
    for rank in ranks:
        one_request = one_request_bytes(rank, length, block_size)
        cache = max(one_request, rank.kv_cache_bytes or 0)
        of_what = f"one request of {length:,} tokens" if rank.kv_cache_bytes is None else "the cache as asked for"
        if cache > rank.left:
            text = (
                f"weights {rank.weight_bytes:,} + activations {rank.activations:,} + buffers {rank.buffers:,} + "
                f"libraries at most {sum(rank.bounded.values()):,} + KV blocks of {of_what} {cache:,} = "
                f"{rank.beside_cache + cache:,} bytes, of {rank.budget:,} that it may use"
            )
            lacking.setdefault((cache - rank.left, text), []).append(rank.rank)
        elif rank.kv_cache_bytes is not None and one_request > rank.kv_cache_bytes:
            text = (
                f"one request of {length:,} tokens needs {one_request:,} bytes of KV blocks; --kv-cache-memory gives "
            )
            text += f"{rank.kv_cache_bytes:,}"
            lacking.setdefault((one_request - rank.kv_cache_bytes, text), []).append(rank.rank)
    for (missing, text), members in sorted(lacking.items(), key=lambda item: -item[0][0]):
        who = f"rank {members[0]} lacks" if len(members) == 1 else f"ranks {members[0]} to {members[-1]} lack each"
        yield f"{who} {missing:,} bytes: {text}"
