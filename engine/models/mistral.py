"""Mistral ("MistralForCausalLM"): Llama's layers, whose attention may slide."""

from engine.models.llama import LlamaModel


class MistralModel(LlamaModel):
    """The window is in the layers' configuration."""
