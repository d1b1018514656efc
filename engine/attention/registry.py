"""Attention backends by name. Classes are imported only when they are used."""

import importlib

import torch

from engine.attention.backend import AttentionBackend

BACKENDS = {
    "reference": "engine.attention.reference:ReferenceAttention",
    "cpu": "engine.attention.cpu:CpuAttention",
}
"""Name to "module:class"."""


def attention_backend(name: str | None = None) -> AttentionBackend:
    """Without a name, the best for this machine."""
    name = name or ("reference" if torch.cuda.is_available() else "cpu")
    module, _, class_name = BACKENDS[name].partition(":")
    backend: AttentionBackend = getattr(importlib.import_module(module), class_name)()
    return backend
