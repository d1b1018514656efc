"""What a plan knows of a model: sizes, and how to make one rank's parameters, without any weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn

from engine.model_config import ModelConfig
from engine.parameter import ParameterBuilder


@dataclass(frozen=True)
class ModelShapes:
    """A model of any architecture whose shapes are known.

    ``config``: of the text model. ``make``: its parameters on the builder's rank; on the meta device nothing is
    allocated. ``vision``: shape by name of the tensors of vision encoder and projector. ``is_served``: whether this
    version computes the model; then its vision part is not loaded, otherwise every rank is counted as holding it whole.
    ``latent_kv_size``: elements that a token keeps in a layer on every rank, where they are not keys and values by
    head. ``cross_attention_layers``: keep nothing for a token of text.
    """

    config: ModelConfig
    make: Callable[[ParameterBuilder], nn.Module]
    is_served: bool = False
    vision: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    latent_kv_size: int | None = None
    cross_attention_layers: frozenset[int] = frozenset()
