"""Qwen3's dense models ("Qwen3ForCausalLM"): Llama's layers, whose queries and keys are normed before the rotation."""

from engine.models.llama import LlamaModel


class Qwen3Model(LlamaModel):
    """Norms and windows are in the layers' configuration."""
