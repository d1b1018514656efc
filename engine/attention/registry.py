"""Attention backends by name. Classes are imported only when they are used."""

import importlib

import torch

from engine.attention.backend import AttentionBackend
from engine.kernels.gpu import has_triton

BACKENDS = {
    "fixed": "engine.attention.fixed:FixedAttention",
    "fixed_cpu": "engine.attention.cpu:FixedCpuAttention",
    "reference": "engine.attention.reference:ReferenceAttention",
    "cpu": "engine.attention.cpu:CpuAttention",
    "cuda": "engine.attention.cuda:CudaAttention",
    "flashinfer": "engine.attention.flashinfer:FlashInferAttention",
}
"""Name to "module:class"."""

CHOICES: dict[str, str | None] = {"auto": None, "triton": "cuda", "flashinfer": "flashinfer"}
"""What a user may choose for GPUs (``--attention-backend``), as a name above; None: the best for the device."""


def attention_backend(
    device: torch.device | None = None, name: str | None = None, *, is_deterministic: bool = False
) -> AttentionBackend:
    """Without a name, the best for a device (by default the CPU). ``is_deterministic``: one whose results for a token
    do not depend on what else is in the step (docs/determinism.md)."""
    is_gpu = device is not None and device.type == "cuda"
    if name is None and is_deterministic:
        name = "fixed" if is_gpu else "fixed_cpu"
    if name is None:
        name = "cpu" if not is_gpu else "cuda" if has_triton() else "reference"
    module, _, class_name = BACKENDS[name].partition(":")
    backend: AttentionBackend = getattr(importlib.import_module(module), class_name)()
    return backend
