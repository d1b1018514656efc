"""A mixture of experts as one native call behind attention (engine/kernels/native/mixture.cpp), for ranks that hold the
same tokens. E experts in the model, K chosen for each token, H hidden size, S slots of this rank."""

import ctypes
from dataclasses import dataclass

import torch

from engine.kernels.experts import GroupedExperts
from engine.kernels.native_matrix import NativeMatrix
from engine.kernels.routing import Scoring

_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64


class NativeMixture(ctypes.Structure):
    """Mixture in native/mixture.cpp."""

    _fields_ = (
        *((name, _POINTER) for name in ("router", "experts", "num_copies", "copies", "loads")),
        *((name, NativeMatrix) for name in ("shared_gate_up", "shared_down")),
        *((name, _NUMBER) for name in ("hidden_size", "width", "num_experts", "num_chosen", "scoring")),
        *((name, _NUMBER) for name in ("scales_inputs", "is_int8", "first_slot", "num_slots", "most_copies")),
        ("first_turn", _NUMBER),
    )


@dataclass(frozen=True)
class PlacedExperts:
    """This rank's slots and where the model's experts lie; all tensors are read again in every step.

    Attributes:
        experts: what the slots from ``first_slot`` hold.
        num_copies: [E] int64.
        copies: [E, most copies] int64: the slots of each expert's copies. A token's copy is the one of number
            (first_turn + token + expert) modulo the expert's number of copies.
        loads: [S] int64, gets the (token, expert) pairs that each slot computed; None: they are not counted.
    """

    experts: GroupedExperts
    num_copies: torch.Tensor
    copies: torch.Tensor
    first_turn: int
    first_slot: int
    num_slots: int
    loads: torch.Tensor | None

    def mixture(
        self,
        router: torch.Tensor,
        num_chosen: int,
        scoring: Scoring,
        shared_expert: tuple[NativeMatrix, NativeMatrix] | None,
        *,
        scales_inputs: bool,
    ) -> NativeMixture:
        """``router``: [E, H] bfloat16; H is a multiple of 32. ``shared_expert``: gate and up, and down. Keeps
        addresses, not tensors."""
        num_experts, hidden_size = router.shape
        assert self.num_copies.is_contiguous() and self.copies.is_contiguous() and router.is_contiguous()
        return NativeMixture(
            router.data_ptr(),
            self.experts.address,
            self.num_copies.data_ptr(),
            self.copies.data_ptr(),
            None if self.loads is None else self.loads.data_ptr(),
            *(shared_expert or (NativeMatrix(), NativeMatrix())),
            hidden_size,
            self.experts.width,
            num_experts,
            num_chosen,
            scoring,
            scales_inputs,
            self.experts.is_int8,
            self.first_slot,
            self.num_slots,
            self.copies.shape[1],
            self.first_turn,
        )
