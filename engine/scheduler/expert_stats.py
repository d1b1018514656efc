"""What an operator is shown of a mixture's experts."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ExpertStats:
    """``imbalance``: of the most loaded ep ranks' pairs ÷ the mean, over all layers, lately. ``rank_pairs``: (token,
    expert) pairs that each ep rank has computed. ``num_moves``: tables that were changed; ``num_failed_moves``: that
    were given up. ``num_moved_experts``: whose weights were read by some rank for it. ``layers``: of each mixture
    layer, by its number in the model, the pairs that each of its experts has had lately."""

    imbalance: float
    rank_pairs: tuple[int, ...]
    num_moves: int
    num_failed_moves: int
    num_moved_experts: int
    layers: dict[int, tuple[int, ...]] = field(default_factory=dict)
