"""Attention backends by name. Classes are imported only when they are used."""

import importlib

import torch

from engine.attention.backend import AttentionBackend
from engine.kernels.gpu import has_triton

BACKENDS = {
    "reference": "engine.attention.reference:ReferenceAttention",
    "cpu": "engine.attention.cpu:CpuAttention",
    "cuda": "engine.attention.cuda:CudaAttention",
    "flashinfer": "engine.attention.flashinfer:FlashInferAttention",
}
"""Name to "module:class"."""


def attention_backend(device: torch.device | None = None, name: str | None = None) -> AttentionBackend:
    """Without a name, the best for a device (by default the CPU)."""
    if name is None:
        is_gpu = device is not None and device.type == "cuda"
        name = "cpu" if not is_gpu else "cuda" if has_triton() else "reference"
    module, _, class_name = BACKENDS[name].partition(":")
    backend: AttentionBackend = getattr(importlib.import_module(module), class_name)()
    return backend
