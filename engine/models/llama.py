"""Llama 1, 2 and 3.x text models, Code Llama, Llama Guard 1 to 3, and others of the same architecture
("LlamaForCausalLM")."""

from engine.layers.decoder import DecoderModel
from engine.layers.feed_forward import GatedFeedForward
from engine.model_config import ModelConfig
from engine.parameter import ParameterBuilder


class LlamaModel(DecoderModel):
    """Dense: every layer has one gated feed-forward part."""

    def __init__(self, config: ModelConfig, build: ParameterBuilder) -> None:
        super().__init__(config, build, dense_feed_forward)


def dense_feed_forward(build: ParameterBuilder, config: ModelConfig, layer: int) -> GatedFeedForward:
    """Also that of other dense models, and of dense layers between mixtures."""
    width = config.layers[layer].intermediate_size
    return GatedFeedForward(build.at("mlp"), config.hidden_size, width, config.mlp_bias)
