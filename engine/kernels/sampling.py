"""What sampling takes from logits, on any device, and on none of them with a wait of the host for it."""

import torch

from engine.kernels.gpu import runs_on_gpu


def most_likely(logits: torch.Tensor) -> torch.Tensor:
    """[R] int64: the column of each row's maximum in ``logits`` [R, vocab] float32, the lowest among equals; −1 where
    the maximum is no finite number (a NaN, an infinity, or nothing but minus infinity)."""
    if runs_on_gpu(logits):
        from engine.kernels.triton.greedy import greedy

        return greedy(logits.contiguous())
    # amax hands on NaN, so one pass sees NaN, an infinity, and rows that are minus infinity throughout.
    return logits.argmax(dim=-1).masked_fill_(~torch.isfinite(logits.amax(dim=-1)), -1)


def gpu_nucleus_border(weights: torch.Tensor, goals: torch.Tensor, num_bits: int) -> torch.Tensor | None:
    """See engine.kernels.triton.nucleus_border; None where the kernel does not serve."""
    if not runs_on_gpu(weights):
        return None
    from engine.kernels.triton.nucleus_border import nucleus_border

    return nucleus_border(weights.contiguous(), goals, num_bits)
