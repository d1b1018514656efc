"""A layer's placement as tensors that routing reads: which slot each token's experts are in.

Slots are numbered over all ep ranks, rank by rank: S on each, so that rank r has r × S … (r + 1) × S − 1. As long as
experts lie in order and none has a copy, an expert's slot is its own number. T tokens, K experts per token.
"""

import torch

from engine.parallel.expert_balance import ExpertPlacement, linear_placement


class ExpertTable:
    """Changes in place, so that whatever holds it, captured graphs too, sees the new placement from then on.

    Args:
        num_experts: E, of the layer.
        placement: to begin with.
        offset: differs among ranks that route different tokens, so that not all begin with the same copy. Ranks that
            route the same tokens must have the same.
        is_fixed: whether ``set`` is never called again.
    """

    def __init__(self, num_experts: int, placement: ExpertPlacement, *, offset: int = 0, is_fixed: bool = True) -> None:
        self._num_experts, self._offset, self._is_fixed = num_experts, offset, is_fixed
        self.placement = placement
        self.num_slots = len(placement.slots[0])
        num_ranks = len(placement.slots)
        self._num_copies = torch.ones(num_experts, dtype=torch.int64)
        # [E, R]: the slots of each expert's copies; a rank holds at most one.
        self._slots = torch.zeros(num_experts, num_ranks, dtype=torch.int64)
        self.set(placement)

    def set(self, placement: ExpertPlacement) -> None:
        """The placement from the next step on; of as many ranks and slots as the one before."""
        placement.check(self._num_experts)
        assert (len(placement.slots), len(placement.slots[0])) == (len(self.placement.slots), self.num_slots)
        self.placement = placement
        copies = placement.copies(self._num_experts)
        num_ranks = len(placement.slots)
        rows = [
            [rank * self.num_slots + slot for rank, slot in places] + [0] * (num_ranks - len(places))
            for places in copies
        ]
        self._num_copies.copy_(torch.tensor([len(places) for places in copies]))
        self._slots.copy_(torch.tensor(rows))
        linear = num_ranks * self.num_slots == self._num_experts
        self._is_linear = linear and placement == linear_placement(self._num_experts, num_ranks, self.num_slots)

    @property
    def copies(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        """As native code reads them, in place: how many copies each expert has, [E] int64, their slots, [E, R] int64,
        and the turn of the first token."""
        return self._num_copies, self._slots, self._offset

    def slots(self, expert_ids: torch.Tensor) -> torch.Tensor:
        """Expert ids [T, K] int64 to the numbers of the slots that compute them. Copies take turns, token by token."""
        # A captured graph repeats what it was captured with, so on GPUs a table that may change is always looked up.
        if self._is_linear and (self._is_fixed or expert_ids.device.type != "cuda"):
            return expert_ids
        if self._slots.device != expert_ids.device:  # once: a plan makes its model on no device at all
            self._num_copies = self._num_copies.to(expert_ids.device)
            self._slots = self._slots.to(expert_ids.device)
        turn = torch.arange(self._offset, self._offset + len(expert_ids), device=expert_ids.device)[:, None]
        copy = (turn + expert_ids) % self._num_copies[expert_ids]
        return self._slots[expert_ids, copy]
