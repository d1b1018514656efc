"""Attention backends by name. Classes are imported only when they are used."""

import importlib

from engine.attention.backend import AttentionBackend

BACKENDS = {"reference": "engine.attention.reference:ReferenceAttention"}
"""Name to "module:class"."""


def attention_backend(name: str = "reference") -> AttentionBackend:
    module, _, class_name = BACKENDS[name].partition(":")
    backend: AttentionBackend = getattr(importlib.import_module(module), class_name)()
    return backend
