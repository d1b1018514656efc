"""What a plan knows of a model: sizes, and how to make one rank's parameters, without any weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import nn

from engine.config import Dtype
from engine.dtypes import torch_dtype
from engine.model_config import ModelConfig
from engine.parallel.mesh import Mesh
from engine.parameter import ParameterBuilder
from engine.quantization_config import QuantizationConfig


@dataclass(frozen=True)
class ModelShapes:
    """A model of any architecture whose shapes are known.

    ``config``: of the text model. ``make``: its parameters on the builder's rank. ``is_served``: whether this version
    computes the model; then its vision part is not loaded, otherwise every rank is counted as holding it whole.
    ``vision``: shape by name of the tensors of vision encoder and projector. ``latent_kv_size``: elements that a token
    keeps in a layer on every rank, where they are not keys and values by head. ``cross_attention_layers``: keep nothing
    for a token of text.
    """

    config: ModelConfig
    make: Callable[[ModelConfig, ParameterBuilder], nn.Module]
    is_served: bool = False
    vision: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    latent_kv_size: int | None = None
    cross_attention_layers: frozenset[int] = frozenset()

    def with_quantization(self, quantization: QuantizationConfig | None) -> Self:
        """The same model, its matrices held otherwise; None: all in the format of the activations."""
        return replace(self, config=replace(self.config, quantization=quantization))

    def build(self, mesh: Mesh, dtype: Dtype) -> nn.Module:
        """A rank's text parameters on the meta device, where nothing is allocated.

        Raises LayoutError where a quantized matrix cannot be cut so.
        """
        config = self.config
        meta = torch.device("meta")
        build = ParameterBuilder(mesh, torch_dtype(dtype), meta, config.tensor_prefix, config.quantization)
        return self.make(config, build)
