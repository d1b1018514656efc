"""The engine's formats as torch dtypes."""

import torch

from engine.config import Dtype

_TORCH_DTYPES = {Dtype.FLOAT32: torch.float32, Dtype.BFLOAT16: torch.bfloat16}


def torch_dtype(dtype: Dtype) -> torch.dtype:
    return _TORCH_DTYPES[dtype]
