"""Which class computes which architecture. Classes are imported only when they are built."""

import importlib
from typing import Protocol

import torch

from engine.attention.backend import KvCacheView, StepAttention
from engine.batch import ForwardBatch
from engine.config import Dtype
from engine.dtypes import torch_dtype
from engine.model_config import ModelConfig, validate_layout
from engine.parallel.mesh import Mesh
from engine.parameter import Conversion, ParameterBuilder, TensorSlice

MODELS = {
    "LlamaForCausalLM": "engine.models.llama:LlamaModel",
    "Llama4ForCausalLM": "engine.models.llama4:Llama4Model",
    "Llama4ForConditionalGeneration": "engine.models.llama4:Llama4Model",
    "MistralForCausalLM": "engine.models.mistral:MistralModel",
    "MixtralForCausalLM": "engine.models.mixtral:MixtralModel",
    "Qwen3ForCausalLM": "engine.models.qwen3:Qwen3Model",
    "Qwen3MoeForCausalLM": "engine.models.qwen3_moe:Qwen3MoeModel",
}
"""Architecture, as config.json names it, to "module:class"."""


class Model(Protocol):
    """One rank's share of a decoder-only language model."""

    config: ModelConfig
    dtype: torch.dtype
    """Of hidden states."""
    slices: tuple[TensorSlice, ...]
    """What the loader must read, and where to."""
    conversions: tuple[Conversion, ...]
    """What it must compute from what it reads."""

    def forward(
        self,
        batch: ForwardBatch,
        kv_cache: KvCacheView,
        attention: StepAttention,
        hidden: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states [T, hidden_size] of the step's tokens after this stage, the same on all tp ranks; normalised
        after the last. ``hidden``: those of the stage before; None in the first."""
        ...

    def forward_idle(self) -> None:
        """Takes part in a step in which other dp groups have tokens, and this rank's has none."""
        ...

    def logits(self, hidden_rows: torch.Tensor) -> torch.Tensor | None:
        """Logits [R, vocab_size] float32 of final hidden states [R, hidden_size], on tp rank 0 of the last stage; None
        on the others.

        All tp ranks must call it with the same rows.
        """
        ...


def build_model(config: ModelConfig, mesh: Mesh, dtype: Dtype, device: torch.device) -> Model:
    """The share of the rank that ``mesh`` stands for, with uninitialised parameters (none at all on the meta device).

    Raises LayoutError where the model cannot be divided so.
    """
    validate_layout(config, mesh.config)
    build = ParameterBuilder(mesh, torch_dtype(dtype), device, config.tensor_prefix, config.quantization)
    return make_model(config, build)


def make_model(config: ModelConfig, build: ParameterBuilder) -> Model:
    """As ``build_model``, without asking whether this version serves the layout: pipeline stages have shapes too.

    Raises LayoutError where a quantized matrix cannot be cut so.
    """
    module, _, name = MODELS[config.architecture].partition(":")
    model_class = getattr(importlib.import_module(module), name)
    model: Model = model_class(config, build)
    return model
