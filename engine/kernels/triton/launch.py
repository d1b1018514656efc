"""What the launches of all kernels share.

Every kernel here also runs on CPU tensors in Triton's interpreter (``TRITON_INTERPRET=1``), which is how it is tested
where there is no GPU. The interpreter holds bfloat16 as 16-bit integers: kernels widen what they load before they
compute with it, and products of matrices get their operands in ``dot_dtype``.
"""

from typing import Any

import torch
import triton
import triton.language as tl

_DOT_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def dot_dtype(dtype: torch.dtype) -> Any:
    """The format in which tensors of ``dtype`` enter ``tl.dot``: their own, but float32 in the interpreter."""
    return tl.float32 if triton.knobs.runtime.interpret else _DOT_DTYPES[dtype]


def power_of_2(number: int, least: int = 1) -> int:
    """The least power of two that is no less than either."""
    return max(least, 1 << (number - 1).bit_length())


def cdiv(numerator: int, denominator: int) -> int:
    """Division rounded up."""
    return -(-numerator // denominator)
