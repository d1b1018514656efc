"""What the leader must know of a gang to balance its experts."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from engine.config import Dtype, ParallelConfig
from engine.layer_config import LayerConfig
from engine.model_config import ModelConfig, stage_layers


@dataclass(frozen=True)
class ExpertLayout:
    """``layers[stage]``: its mixture layers' numbers in the model. ``num_slots``: of each ep rank in each layer.
    ``ranks_per_host[stage]``: how many neighbouring ep ranks each host has. ``ranks_per_stage``: of the gang.
    ``expert_bytes``: of one expert on one rank, about. ``expert_share``: of a token's arithmetic, what the routed
    experts do, about. ``moves``: whether experts may be moved; else loads are only counted."""

    layers: tuple[tuple[int, ...], ...]
    num_experts: int
    num_slots: int
    ranks_per_host: tuple[tuple[int, ...], ...]
    ranks_per_stage: int
    expert_tp: int
    expert_bytes: int
    expert_share: float
    moves: bool

    @property
    def num_ep_ranks(self) -> int:
        return sum(self.ranks_per_host[0])


def expert_layout(model: ModelConfig, parallel: ParallelConfig, hosts: Sequence[str], dtype: Dtype) -> ExpertLayout:
    """``hosts``: of each rank, in order; an ep rank is where the first of its expert_tp ranks is."""
    per_stage = parallel.dp * parallel.tp
    moe = next(layer.moe for layer in model.layers if layer.moe is not None)
    by_stage = []
    for stage in range(parallel.pp):
        places = hosts[stage * per_stage : (stage + 1) * per_stage : parallel.expert_tp]
        by_stage.append(tuple(len(list(run)) for _, run in itertools.groupby(places)))
    return ExpertLayout(
        layers=tuple(
            tuple(layer for layer in layers if model.layers[layer].moe is not None)
            for layers in stage_layers(model, parallel.pp)
        ),
        num_experts=moe.num_experts,
        num_slots=parallel.num_expert_slots(moe.num_experts),
        ranks_per_host=tuple(by_stage),
        ranks_per_stage=per_stage,
        expert_tp=parallel.expert_tp,
        expert_bytes=3 * model.hidden_size * moe.intermediate_size // parallel.expert_tp * dtype.num_bytes,
        expert_share=_expert_share(model),
        moves=parallel.balances_experts,
    )


def _expert_share(model: ModelConfig) -> float:
    """By the numbers of weights that a token is multiplied with."""
    routed = sum(_routed(model, layer) for layer in model.layers)
    heads = 2 * model.num_heads + 2 * model.num_kv_heads
    others = model.hidden_size * (len(model.layers) * heads * model.head_dim + model.vocab_size)
    for layer in model.layers:
        if layer.moe is None:
            others += 3 * model.hidden_size * layer.intermediate_size
        elif layer.moe.has_shared_expert:
            others += 3 * model.hidden_size * layer.moe.intermediate_size
    return routed / (routed + others)


def _routed(model: ModelConfig, layer: LayerConfig) -> int:
    if layer.moe is None:
        return 0
    return 3 * model.hidden_size * layer.moe.intermediate_size * layer.moe.num_experts_per_token
