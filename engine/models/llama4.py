"""Llama 4 text models ("Llama4ForCausalLM", and the text part of "Llama4ForConditionalGeneration"), Llama Guard 4.

Chunked attention with rotation in most layers, full attention without in the others, mixtures of experts in all, every
other or no layer: all of it is in the layers' configuration.
"""

from engine.layers.decoder import DecoderModel, FeedForward
from engine.layers.experts import ExpertNames, make_experts
from engine.layers.feed_forward import GatedFeedForward
from engine.layers.moe import MixtureOfExperts
from engine.layers.router import SigmoidRouter
from engine.model_config import ModelConfig
from engine.parameter import ParameterBuilder


class Llama4Model(DecoderModel):
    """Each layer's feed-forward part is dense or a mixture with a shared expert, whose scores scale the inputs."""

    def __init__(self, config: ModelConfig, build: ParameterBuilder) -> None:
        super().__init__(config, build, _feed_forward)


def _feed_forward(build: ParameterBuilder, config: ModelConfig, layer: int) -> FeedForward:
    build = build.at("feed_forward")
    size, moe = config.hidden_size, config.layers[layer].moe
    if moe is None:
        return GatedFeedForward(build, size, config.layers[layer].intermediate_size)
    return MixtureOfExperts(
        build.mesh,
        SigmoidRouter(build, "router", size, moe),
        make_experts(build.at("experts"), size, moe, ExpertNames(is_fused=True)),
        shared_expert=GatedFeedForward(build.at("shared_expert"), size, moe.intermediate_size),
        scales_inputs=True,
    )
