"""How the layers of a model are divided among pipeline stages and, within them, among KV groups. Pure arithmetic."""

import functools
from collections.abc import Sequence


@functools.lru_cache(maxsize=256)
def divide_layers(costs: tuple[int, ...], first_extra: int, last_extra: int, num_stages: int) -> tuple[range, ...]:
    """Neighbouring layers for each stage, none empty, so that the squares of the stages' costs have the least sum: as
    even as can be.

    Args:
        costs: of each layer.
        first_extra: what the first stage holds besides (the embedding).
        last_extra: what the last stage holds besides (the head).
    """
    num_layers = len(costs)
    assert 1 <= num_stages <= num_layers, f"{num_layers} layers do not fill {num_stages} stages"
    before = [0]
    for cost in costs:
        before.append(before[-1] + cost)
    # best[end]: the least sum of squares with the stages so far, which hold the layers before ``end``.
    best = [(before[end] + first_extra) ** 2 for end in range(num_layers + 1)]
    starts: list[list[int]] = []
    for stage in range(1, num_stages):
        former, extra = best, last_extra if stage == num_stages - 1 else 0
        best, chosen = [0] * (num_layers + 1), [0] * (num_layers + 1)
        for end in range(stage + 1, num_layers + 1):
            best[end], chosen[end] = min(
                (former[start] + (before[end] - before[start] + extra) ** 2, start) for start in range(stage, end)
            )
        starts.append(chosen)
    borders = [num_layers]
    for chosen in reversed(starts):
        borders.append(chosen[borders[-1]])
    borders = [0, *reversed(borders)]
    return tuple(range(borders[stage], borders[stage + 1]) for stage in range(num_stages))


def num_groups_of_kinds(counts: Sequence[Sequence[int]]) -> list[int]:
    """Into how many KV groups the layers of each kind are divided, so that a token's blocks take least memory where
    they take most.

    A block has one size on a rank: that of the group with most layers there. All stages have the same groups.

    Args:
        counts: of each stage, its layers of each kind (full, chunked, sliding).
    """
    columns = list(zip(*counts, strict=True))
    best: tuple[int, list[int]] | None = None
    # Of equally good ones the fewest groups, which are the largest.
    for size in range(max(map(max, columns)), 0, -1):
        num_groups = [-(-max(column) // size) for column in columns]
        worst = max(sum(num_groups) * _largest_group(stage, num_groups) for stage in counts)
        if best is None or worst < best[0]:
            best = worst, num_groups
    assert best is not None, "a model has layers"
    return best[1]


def _largest_group(counts: Sequence[int], num_groups: Sequence[int]) -> int:
    """Layers of the largest group on a stage that has ``counts`` layers of each kind."""
    return max(-(-count // groups) for count, groups in zip(counts, num_groups, strict=True) if groups)
