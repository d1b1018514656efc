"""torch's own product of bfloat16 activations and int4 weights on CPUs.

It reads the codes of 64 rows together: for each input 32 bytes, of which number i holds row i in its low half and row
i + 32 in its high half. torch does not document this order, so it is asked whether it is so; on CPUs without AVX-512 it
is another, and weights are converted by tiles there.
"""

import functools
from collections.abc import Sequence

import torch

BLOCK_ROWS = 64
MAX_TOKENS = 48
"""With more tokens, converting the weights and multiplying them as bfloat16 is faster."""
_GROUP_SIZES = (32, 64, 128, 256)


def can_multiply(dtype: torch.dtype, device: torch.device, group_size: int, row_counts: Sequence[int]) -> bool:
    """Whether ``multiply`` serves matrices of so many rows, one below another."""
    return (
        dtype == torch.bfloat16
        and device.type == "cpu"
        and group_size in _GROUP_SIZES
        and all(count % BLOCK_ROWS == 0 for count in row_counts)
        and is_packed_as_here()
    )


def pack_blocks(codes: torch.Tensor) -> torch.Tensor:
    """Codes [n, in] uint8, n a multiple of 64, to the [n, in / 2] bytes that ``multiply`` wants."""
    low, high = codes.unflatten(0, (-1, 2, BLOCK_ROWS // 2)).unbind(1)
    by_row: torch.Tensor = low | high << 4
    return by_row.transpose(1, 2).reshape(len(codes), -1)


def unpack_blocks(packed: torch.Tensor) -> torch.Tensor:
    """The reverse of ``pack_blocks``."""
    num_rows, num_inputs = packed.shape[0], packed.shape[1] * 2
    by_input = packed.view(-1, num_inputs, BLOCK_ROWS // 2).transpose(1, 2)
    return torch.stack((by_input & 15, by_input >> 4), dim=1).view(num_rows, num_inputs)


def unpack_rows(packed: torch.Tensor, index: slice | torch.Tensor) -> torch.Tensor:
    """Codes of some rows: [n, in] uint8."""
    if isinstance(index, torch.Tensor):
        blocks = packed.unflatten(0, (-1, BLOCK_ROWS))[index // BLOCK_ROWS].flatten(0, 1)
        own = torch.arange(len(index), device=index.device) * BLOCK_ROWS + index % BLOCK_ROWS
        return unpack_blocks(blocks)[own]
    first, last, step = index.indices(len(packed))
    start = first // BLOCK_ROWS * BLOCK_ROWS
    end = -(-last // BLOCK_ROWS) * BLOCK_ROWS
    return unpack_blocks(packed[start:end])[first - start : last - start : step]


def multiply(
    hidden: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, group_size: int
) -> torch.Tensor:
    """[T, in] to [T, n], both bfloat16. ``scales``, ``zeros`` [n, groups] as in GroupedInt4Matrix; scales, and what a
    group adds, (8 − zero) · scale, are rounded to bfloat16."""
    scales = scales.to(torch.bfloat16)
    added = torch.zeros_like(scales) if zeros is None else (8 - zeros.view(torch.int8)).to(torch.bfloat16).mul_(scales)
    by_group = torch.stack((scales.t(), added.t()), dim=-1)
    return torch.ops.aten._weight_int4pack_mm_for_cpu(hidden, packed, group_size, by_group)  # type: ignore[no-any-return]


@functools.cache
def is_packed_as_here() -> bool:
    """Whether this machine's torch reads codes in the order of ``pack_blocks``."""
    codes = (torch.arange(2 * BLOCK_ROWS * 32, dtype=torch.int32) * 7919 >> 5) & 15
    codes = codes.view(2 * BLOCK_ROWS, 32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return torch.equal(packed.view(len(codes), -1), pack_blocks(codes.to(torch.uint8)))
