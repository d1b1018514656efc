"""Llama 4 text models ("Llama4ForCausalLM", and the text part of "Llama4ForConditionalGeneration").

Chunked attention with rotation in most layers, full attention without in the others, mixtures of experts in all or
every other layer: all of it is in the layers' configuration.
"""

from engine.layers.decoder import DecoderModel, FeedForward
from engine.layers.feed_forward import GatedFeedForward
from engine.layers.moe import MixtureOfExperts
from engine.model_config import ModelConfig
from engine.parameter import ParameterBuilder


class Llama4Model(DecoderModel):
    """Each layer's feed-forward part is a mixture of experts or dense."""

    def __init__(self, config: ModelConfig, build: ParameterBuilder) -> None:
        super().__init__(config, build, _feed_forward)


def _feed_forward(build: ParameterBuilder, config: ModelConfig, layer: int) -> FeedForward:
    build = build.at("feed_forward")
    if moe := config.layers[layer].moe:
        return MixtureOfExperts(build, config.hidden_size, moe)
    return GatedFeedForward(build, config.hidden_size, config.layers[layer].intermediate_size)
