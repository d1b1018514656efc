"""Qwen3's mixtures of experts ("Qwen3MoeForCausalLM"). Attention is that of its dense models."""

from engine.layers.decoder import DecoderModel, FeedForward
from engine.layers.experts import ExpertNames, make_experts
from engine.layers.moe import MixtureOfExperts
from engine.layers.router import SoftmaxRouter
from engine.model_config import ModelConfig
from engine.models.llama import dense_feed_forward
from engine.parameter import ParameterBuilder


class Qwen3MoeModel(DecoderModel):
    """Each layer's feed-forward part is dense or a mixture, whose scores scale the experts' outputs."""

    def __init__(self, config: ModelConfig, build: ParameterBuilder) -> None:
        super().__init__(config, build, _feed_forward)


def _feed_forward(build: ParameterBuilder, config: ModelConfig, layer: int) -> FeedForward:
    size, moe = config.hidden_size, config.layers[layer].moe
    if moe is None:
        return dense_feed_forward(build, config, layer)
    build = build.at("mlp")
    router = SoftmaxRouter(build, "gate", size, moe)
    return MixtureOfExperts(build.mesh, router, make_experts(build.at("experts"), size, moe, ExpertNames()))
