"""Whether the kernels in engine/kernels/triton serve a tensor. Triton comes with torch's CUDA build; it is imported
only when a kernel is launched, and where it is missing torch's own operations do the work."""

import functools
import importlib.util

import torch


def runs_on_gpu(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is on a CUDA device, in a format that the kernels compute in."""
    return tensor.is_cuda and tensor.dtype in (torch.bfloat16, torch.float32) and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
