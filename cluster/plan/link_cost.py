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


def expert_exchange_traffic(
    model: ModelConfig, ranks: int, ranks_per_host: int, num_tokens: int, bytes_per_number: int
) -> StepTraffic:
    """What a step sends out of a host whose ``ranks_per_host`` of a stage's ``ranks`` ranks exchange tokens.

    Each layer with experts sends tokens to them and takes the outputs back. ``num_tokens``: of all ranks; each has
    ``num_experts_per_token`` experts, which are taken to lie anywhere, and goes once to each rank that has any.
    """
    layers = [layer.moe for layer in model.layers if layer.moe is not None]
    share_of_ranks = sum(1 - (1 - 1 / ranks) ** moe.num_experts_per_token for moe in layers)
    there = int(num_tokens * share_of_ranks * ranks_per_host * (ranks - ranks_per_host) / ranks)
    return StepTraffic(2 * len(layers), 2 * there * model.hidden_size * bytes_per_number)


def pipeline_traffic(model: ModelConfig, num_crossings: int, num_tokens: int, bytes_per_number: int) -> StepTraffic:
    """Of a micro-batch of ``num_tokens`` whose way leads from host to host ``num_crossings`` times; what was sampled
    goes back to the leader, one number for each token."""
    row_bytes = model.hidden_size * bytes_per_number
    return StepTraffic(num_crossings + 1, num_crossings * num_tokens * row_bytes)


def pipeline_loss(stage_s: float, pp: int, num_in_flight: int, link_s: float) -> float:
    """The share of throughput that ``pp`` stages lose to their links, ``num_in_flight`` micro-batches being under way.

    A micro-batch comes round in pp · stage_s + link_s, or when the others have had each stage, whichever is later.
    """
    least_s = num_in_flight * stage_s
    return 1 - max(least_s, pp * stage_s) / max(least_s, pp * stage_s + link_s)
