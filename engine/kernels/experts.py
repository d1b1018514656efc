"""A layer's routed experts in one call, on CPUs with tile units (AMX): down(silu(gate(x)) · up(x)) of each expert's
tokens, with weights in bfloat16 or int8.

Results are those of ``linear`` or ``linear_int8`` (engine.kernels.linear) and ``silu_multiply`` expert by expert, bit
for bit, so that a token's result does not depend on the tokens beside it. N tokens, E experts, H hidden size, I width.
"""

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from engine.kernels.native_library import tile_library

_STEP_BYTES = 64
"""Of a row of weights, which the tile unit takes together."""


@dataclass(frozen=True)
class ExpertMatrices:
    """Of one expert: ``gate_up`` [2 × I, H], gate first, and ``down`` [H, I], in bfloat16 or int8. int8 rows have
    float32 scales: ``gate_up_scales`` [2 × I] and ``down_scales`` [H]."""

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_scales: torch.Tensor | None = None
    down_scales: torch.Tensor | None = None


class _Expert(ctypes.Structure):
    """Expert in native/experts.cpp."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("gate_up", "down", "gate_up_scales", "down_scales"))


class GroupedExperts:
    """All of a rank's experts as the kernel takes them. Refers to the matrices, which must be changed in place only."""

    def __init__(self, experts: Sequence[ExpertMatrices]) -> None:
        """Only where ``can_group`` says so."""
        self._experts = tuple(experts)  # keeps alive what the addresses below point to
        self._hidden_size, self.width = experts[0].down.shape
        addresses = [
            _Expert(*map(_address, (one.gate_up, one.down, one.gate_up_scales, one.down_scales))) for one in experts
        ]
        self._native = (_Expert * len(addresses))(*addresses)
        library = _library()
        assert library is not None
        self.is_int8 = experts[0].gate_up.dtype is torch.int8
        self._compute = library.remuda_experts_int8 if self.is_int8 else library.remuda_experts_bf16
        self._scratch_bytes: int = library.remuda_experts_scratch_bytes(self._hidden_size, self.width)

    @property
    def address(self) -> int:
        """Of the native experts, for native code that calls the kernel itself."""
        return ctypes.addressof(self._native)

    def forward(self, tokens: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """[N, H] bfloat16, sorted by expert, with how many belong to each, [E] int64, to [N, H] bfloat16."""
        tokens, counts = tokens.contiguous(), counts.contiguous()
        outputs = torch.empty_like(tokens)
        scratch = torch.empty(self._scratch_bytes, dtype=torch.uint8)
        self._compute(
            self._native,
            len(self._experts),
            self._hidden_size,
            self.width,
            tokens.data_ptr(),
            counts.data_ptr(),
            outputs.data_ptr(),
            scratch.data_ptr(),
        )
        return outputs


def can_group(experts: Sequence[ExpertMatrices]) -> bool:
    """Whether ``GroupedExperts`` takes ``experts``, which are alike."""
    if _library() is None or not experts:
        return False
    down = experts[0].down
    step = _STEP_BYTES // down.element_size()
    return (
        down.dtype in (torch.bfloat16, torch.int8)
        and down.device.type == "cpu"
        and all(size % step == 0 for size in down.shape)
    )


def _address(tensor: torch.Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    return tensor.data_ptr()


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = tile_library()
    if library is None:
        return None
    pointer: Any = ctypes.c_void_p
    number: Any = ctypes.c_int64
    library.remuda_experts_scratch_bytes.argtypes = [number] * 2
    library.remuda_experts_scratch_bytes.restype = number
    for function in (library.remuda_experts_bf16, library.remuda_experts_int8):
        function.argtypes = [pointer] + [number] * 3 + [pointer] * 4
        function.restype = None
    return library
