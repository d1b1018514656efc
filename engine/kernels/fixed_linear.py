"""Matrix products in which a number depends on its own row of inputs and its own row of weights alone: not on how many
rows are beside them, nor on where among them they stand.

There is one algorithm whatever the sizes. bfloat16 on CPUs with tile units: the kernel of engine.kernels.linear, which
adds up in the order of the inputs; rows are filled up with zeros where it wants more of them. On other CPUs, and in
float32: torch's product of tiles of one size. Which order of summation its library takes depends on the sizes, which
are always the same here, and might depend on the place in a tile, which is tried out once. On GPUs: a Triton kernel
with one configuration and no division of the sum ("Defeating Nondeterminism in LLM Inference", Thinking Machines 2025).
"""

import functools

import torch
from torch.nn import functional

from engine.errors import InvalidOption
from engine.kernels.linear import has_tiles, tile_linear

_TILE_ROWS = 16
_TILE_COLUMNS = 256
_ALIGNMENT = 64
"""Bytes; some kernels begin differently elsewhere."""
_NATIVE_STEP = 32
"""Of inputs and outputs, which the tile units take together."""


def fixed_linear(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``hidden`` [T, in] times the transpose of ``weight`` [out, in]: [T, out], of the same format.

    Raises InvalidOption where this machine's product turns out to depend on the place in a tile.
    """
    if len(hidden) == 0:
        return hidden.new_empty(0, len(weight))
    if hidden.is_cuda:
        from engine.kernels.triton import fixed_linear as kernels

        return kernels.fixed_linear(hidden, weight)
    if hidden.dtype is torch.bfloat16 and has_tiles():
        return _native(hidden, weight)
    return _by_tiles(hidden, weight)


def gpu_fixed_linears(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """On a GPU, several at once: [B, T, in] by [B, out, in] to [B, T, out]."""
    from engine.kernels.triton import fixed_linear as kernels

    return kernels.fixed_linears(hidden, weight)


def _native(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    num_outputs, num_inputs = weight.shape
    if missing := -num_inputs % _NATIVE_STEP:
        hidden, weight = functional.pad(hidden, (0, missing)), functional.pad(weight, (0, missing))
    rest = num_outputs % _NATIVE_STEP
    if not rest:
        return tile_linear(hidden, weight.contiguous())
    whole = num_outputs - rest
    last = tile_linear(hidden, functional.pad(weight[whole:], (0, 0, 0, _NATIVE_STEP - rest)))[:, :rest]
    return torch.cat((tile_linear(hidden, weight[:whole].contiguous()), last), dim=1) if whole else last.contiguous()


def _by_tiles(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    (num_tokens, num_inputs), num_outputs = hidden.shape, len(weight)
    if not _knows_no_place(hidden.dtype, num_inputs):
        raise InvalidOption(
            f"--deterministic cannot be kept here: torch's product of {hidden.dtype} with {num_inputs} inputs depends "
            "on the place of a row; use another --dtype"
        )
    rows = _aligned(functional.pad(hidden, (0, 0, 0, -num_tokens % _TILE_ROWS)))
    output = hidden.new_empty(len(rows), num_outputs)
    for column in range(0, num_outputs, _TILE_COLUMNS):
        block = weight[column : column + _TILE_COLUMNS]
        width = len(block)
        block = _aligned(functional.pad(block, (0, 0, 0, _TILE_COLUMNS - width)) if width < _TILE_COLUMNS else block)
        for row in range(0, len(rows), _TILE_ROWS):
            product = functional.linear(rows[row : row + _TILE_ROWS], block)
            output[row : row + _TILE_ROWS, column : column + width] = product[:, :width]
    return output[:num_tokens]


def _aligned(matrix: torch.Tensor) -> torch.Tensor:
    matrix = matrix.contiguous()
    return matrix.clone() if matrix.data_ptr() % _ALIGNMENT else matrix


@functools.cache
def _knows_no_place(dtype: torch.dtype, num_inputs: int) -> bool:
    """Equal rows by equal rows must give one and the same number everywhere in a tile."""
    generator = torch.Generator().manual_seed(num_inputs)
    token, weight = (torch.randn(num_inputs, generator=generator).to(dtype) for _ in range(2))
    rows, block = token.expand(_TILE_ROWS, -1).contiguous(), weight.expand(_TILE_COLUMNS, -1).contiguous()
    product = functional.linear(rows, block)
    return torch.equal(product, product[:1, :1].expand_as(product))
