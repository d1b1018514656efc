"""GGUF's blocks to float32, as ggml decodes them.

Blocks are uint8 [n, bytes of a block]; what they stand for is float32 [n, weights of a block]. Scales are float16
among the bytes. K types have 256 weights in sub-blocks of 32 (Q6_K: 16), each with an integer scale of its own.
"""

from collections.abc import Callable

import torch

from engine.gguf.block_types import QUANTIZED_TYPES

_SUB_BLOCK = 32
_PACKED_SCALES = 12
"""Bytes in which Q4_K and Q5_K hold eight scales and eight minima of six bits."""


def dequantize(blocks: torch.Tensor, type_name: str) -> torch.Tensor:
    """Blocks [n, bytes] of the quantized type ``type_name`` to float32 [n, weights]."""
    return _DECODERS[type_name](blocks)


def scales_are_finite(rows: torch.Tensor, type_name: str) -> bool:
    """Whether no block of ``rows`` (uint8 [..., whole blocks]) has a scale that is NaN or infinite."""
    kind = QUANTIZED_TYPES[type_name]
    blocks = rows.reshape(-1, kind.block_bytes)
    return all(bool(_halves(blocks, offset).isfinite().all()) for offset in kind.scale_offsets)


def _halves(blocks: torch.Tensor, offset: int) -> torch.Tensor:
    """The float16 at a byte offset of each block, as float32 [n, 1]."""
    return blocks[:, offset : offset + 2].contiguous().view(torch.float16).float()


def _signed(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.contiguous().view(torch.int8).float()


def _fields(packed: torch.Tensor, width: int, bits: int) -> torch.Tensor:
    """Cut bytes [n, m] into runs of ``width``; each run's bytes give their lowest ``bits`` bits, then the next, and so
    on: uint8 [n, m × 8 / bits]."""
    runs = packed.unflatten(1, (packed.shape[1] // width, width))
    # One shift after the other: by a tensor of shifts it takes four times as long.
    return torch.stack([(runs >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], dim=2).flatten(1)


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    codes = _fields(blocks[:, 2:], _SUB_BLOCK // 2, bits=4)
    return _halves(blocks, 0) * (codes.float() - 8)


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return _halves(blocks, 0) * _signed(blocks[:, 2:])


def _q4_k(blocks: torch.Tensor) -> torch.Tensor:
    codes = _fields(blocks[:, 4 + _PACKED_SCALES :], _SUB_BLOCK, bits=4)
    return _scaled_with_minima(blocks, codes)


def _q5_k(blocks: torch.Tensor) -> torch.Tensor:
    start = 4 + _PACKED_SCALES
    high, low = blocks[:, start : start + _SUB_BLOCK], blocks[:, start + _SUB_BLOCK :]
    return _scaled_with_minima(blocks, _fields(low, _SUB_BLOCK, bits=4) | (_fields(high, _SUB_BLOCK, bits=1) << 4))


def _scaled_with_minima(blocks: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Sub-block i of 32 codes is scale · scale_i · code − minimum · minimum_i. Of the packed bytes the first four hold
    the low six bits of scales 0 to 3, the next four those of the minima; the last four hold the low halves of scales
    and minima 4 to 7, whose two high bits stand atop the first eight."""
    first, second, third = blocks[:, 4 : 4 + _PACKED_SCALES].chunk(3, dim=1)
    scales = torch.cat((first & 0x3F, (third & 0x0F) | ((first >> 2) & 0x30)), dim=1)
    minima = torch.cat((second & 0x3F, (third >> 4) | ((second >> 2) & 0x30)), dim=1)
    scale = (_halves(blocks, 0) * scales.float())[:, :, None]
    minimum = (_halves(blocks, 2) * minima.float())[:, :, None]
    weights: torch.Tensor = codes.unflatten(1, (8, _SUB_BLOCK)).float()
    return weights.mul_(scale).sub_(minimum).flatten(1)


def _q6_k(blocks: torch.Tensor) -> torch.Tensor:
    low, high, sub_scales = blocks[:, :128], blocks[:, 128:192], blocks[:, 192:208]
    codes = _fields(low, 64, bits=4) | (_fields(high, 32, bits=2) << 4)
    scale = (_halves(blocks, 208) * _signed(sub_scales))[:, :, None]
    weights: torch.Tensor = codes.unflatten(1, (16, 16)).float()
    return weights.sub_(32).mul_(scale).flatten(1)


_DECODERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Q4_0": _q4_0,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
