"""Whether the kernels in engine/kernels/triton serve a tensor. Triton comes with torch's CUDA build; it is imported
only when a kernel is launched, and where it is missing torch's own operations do the work."""

import functools
import importlib.util

import torch

_DTYPES = (torch.bfloat16, torch.float32, torch.int64)


def runs_on_gpu(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is on a CUDA device, in a format that the kernels take."""
    return tensor.is_cuda and tensor.dtype in _DTYPES and has_triton()


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
