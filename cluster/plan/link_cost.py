"""What a tensor-parallel group that crosses hosts pays for its link, from shapes and the link's numbers. Pure.

A layer ends each of its halves (attention, feed-forward) with an all-reduce of one row for each token, and the group
waits for it; the embedding needs one more. A decode step therefore takes its reading of weights, plus so many waits,
plus the bytes over the link.
"""

from dataclasses import dataclass

from engine.model_config import ModelConfig

_ALL_REDUCES_OF_A_LAYER = 2
_ALL_REDUCES_BESIDE = 1


@dataclass(frozen=True)
class Link:
    """``wait_s``: of the smallest collective over it; ``bytes_per_s``: one way."""

    wait_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class StepTraffic:
    """Of one step over one link, one way: how many collectives wait for it, and the bytes of all together."""

    num_collectives: int
    num_bytes: int

    def seconds(self, link: Link) -> float:
        return self.num_collectives * link.wait_s + self.num_bytes / link.bytes_per_s


def tensor_parallel_traffic(
    model: ModelConfig, tp: int, ranks_per_host: int, num_tokens: int, bytes_per_number: int
) -> StepTraffic:
    """What a step of ``num_tokens`` sends out of a host that holds ``ranks_per_host`` of the ``tp`` ranks.

    Each rank exchanges small tensors in full with every other (engine/parallel/distributed.py), so the host's link
    carries a copy for each pair of a rank here and a rank elsewhere.
    """
    num_collectives = _ALL_REDUCES_OF_A_LAYER * model.num_layers + _ALL_REDUCES_BESIDE
    num_copies = ranks_per_host * (tp - ranks_per_host)
    row_bytes = model.hidden_size * bytes_per_number
    return StepTraffic(num_collectives, num_collectives * num_copies * num_tokens * row_bytes)


def predicted_loss(step_s: float, link_s: float) -> float:
    """The share of a step that is lost to the link: 0.5 means that the gang is half as fast as without."""
    return link_s / (step_s + link_s)
