"""What the architectures that are planned and not served have in common. Parameters only: nothing here computes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from engine.config import Dtype
from engine.layer_config import LayerConfig
from engine.layers.embedding import VocabEmbedding
from engine.layers.norm import RmsNorm
from engine.model_config import ModelConfig
from engine.parameter import ParameterBuilder
from engine.quantization_config import parse_quantization
from engine.rope_config import parse_rope


class DecoderShapes(nn.Module):
    """The parameters of a rank's stage: embedding in the first, layers, final norm and head in the last.

    ``num_extra_tokens``: rows of the embedding that the head does not have. ``slices``: the checkpoint's tensors.
    """

    def __init__(
        self,
        config: ModelConfig,
        build: ParameterBuilder,
        make_layer: Callable[[ParameterBuilder, int], nn.Module],
        num_extra_tokens: int = 0,
    ) -> None:
        super().__init__()
        body, mesh = build.at("model"), build.mesh
        if mesh.is_first_stage or (mesh.is_last_stage and config.tie_word_embeddings):
            num_tokens = config.vocab_size + num_extra_tokens
            self.embedding = VocabEmbedding(body, "embed_tokens", num_tokens, config.hidden_size)
        layers = mesh.layers(config)
        self.layers = nn.ModuleList(make_layer(body.at(f"layers.{layer}"), layer) for layer in layers)
        if mesh.is_last_stage:
            self.norm = RmsNorm(body, "norm", config.hidden_size, config.rms_norm_eps)
        if mesh.is_last_stage and not config.tie_word_embeddings:
            self.head = VocabEmbedding(build, "lm_head", config.vocab_size, config.hidden_size)
        self.slices = tuple(build.slices)


class WholeParameters(nn.Module):
    """Parameters that every rank holds in full, by their names in the checkpoint."""

    def __init__(self, build: ParameterBuilder, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.values = nn.ParameterList(build.whole(name, *shape) for name, shape in shapes.items())


def planned_config(
    architecture: str,
    text: Mapping[str, Any],
    layers: Sequence[LayerConfig],
    *,
    head_dim: int,
    tensor_prefix: str = "",
) -> ModelConfig:
    """From config.json, the text model's part on top. Raises KeyError where a size is missing."""
    num_heads = int(text["num_attention_heads"])
    scheme = text.get("quantization_config")
    dtype = str(text.get("dtype") or text.get("torch_dtype") or "float32").removeprefix("torch.")
    return ModelConfig(
        architecture=architecture,
        vocab_size=int(text["vocab_size"]),
        hidden_size=int(text["hidden_size"]),
        num_heads=num_heads,
        num_kv_heads=int(text.get("num_key_value_heads") or num_heads),
        head_dim=head_dim,
        layers=tuple(layers),
        rope=parse_rope(text, head_dim, float(text.get("rope_theta", 10000.0)), interleaved=False),
        rms_norm_eps=float(text.get("rms_norm_eps", 1e-6)),
        max_position_embeddings=int(text["max_position_embeddings"]),
        tie_word_embeddings=bool(text.get("tie_word_embeddings", False)),
        dtype=Dtype.FLOAT32 if dtype == "float32" else Dtype.BFLOAT16,
        tensor_prefix=tensor_prefix,
        quantization=parse_quantization(scheme) if scheme else None,
    )
