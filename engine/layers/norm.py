"""Root-mean-square norms (arXiv 1910.07467). Statistics are taken in float32 whatever the input's format."""

import torch
from torch import nn

from engine.kernels.elementwise import add_rms_norm, rms_norm
from engine.parameter import ParameterBuilder


def rms_normalize(hidden: torch.Tensor, eps: float) -> torch.Tensor:
    """Divide each row of [..., n] by its root mean square; no weights."""
    normalized = rms_norm(hidden, None, eps)
    if normalized is not None:
        return normalized
    wide = hidden.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(hidden.dtype)


class RmsNorm(nn.Module):
    """RMS norm with a weight per channel, held in full by every rank."""

    def __init__(self, build: ParameterBuilder, name: str, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = build.whole(f"{name}.weight", size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., size] to [..., size]."""
        normalized = rms_norm(hidden, self.weight, self.eps)
        return rms_normalize(hidden, self.eps) * self.weight if normalized is None else normalized

    def add(self, hidden: torch.Tensor, update: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """``hidden`` + ``update``, both [T, size], and the norm of the sum. None: nothing is added."""
        if update is None:
            return hidden, self.forward(hidden)
        both = add_rms_norm(hidden, update, self.weight, self.eps)
        if both is not None:
            return both
        total = hidden + update
        return total, self.forward(total)
