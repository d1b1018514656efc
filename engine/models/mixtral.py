"""Mixtral ("MixtralForCausalLM"): a mixture of experts in every layer, whose scores scale the experts' outputs."""

from engine.layers.decoder import DecoderModel
from engine.layers.experts import ExpertNames, make_experts
from engine.layers.moe import MixtureOfExperts
from engine.layers.router import SoftmaxRouter
from engine.model_config import ModelConfig
from engine.parameter import ParameterBuilder

_NAMES = ExpertNames(gate="w1", up="w3", down="w2")


class MixtralModel(DecoderModel):
    """All layers are mixtures without a shared expert."""

    def __init__(self, config: ModelConfig, build: ParameterBuilder) -> None:
        super().__init__(config, build, _feed_forward)


def _feed_forward(build: ParameterBuilder, config: ModelConfig, layer: int) -> MixtureOfExperts:
    build = build.at("block_sparse_moe")
    size, moe = config.hidden_size, config.layers[layer].moe
    assert moe is not None, "Mixtral has no dense layers"
    router = SoftmaxRouter(build, "gate", size, moe)
    return MixtureOfExperts(build.mesh, router, make_experts(build.at("experts"), size, moe, _NAMES))
