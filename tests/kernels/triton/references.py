"""What the kernels should compute, in float64 and written as plainly as can be; and how far they may be from it."""

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Without a GPU the kernels run in Triton's interpreter (tests/conftest.py sees to it)."""

TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2**-6}
"""Of the largest number in the result. Triton's interpreter cuts bfloat16 off where a GPU rounds."""


def randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape).to(dtype).to(DEVICE)


def check_close(found: torch.Tensor, expected: torch.Tensor, num_roundings: int = 1) -> None:
    """``expected``: float64. ``num_roundings``: how often numbers are rounded on the way, each adding its error."""
    assert found.shape == expected.shape and expected.dtype == torch.float64
    worst = (found.double() - expected).abs().max().item()
    bound = num_roundings * TOLERANCES[found.dtype] * max(1.0, expected.abs().max().item())
    assert worst <= bound, f"off by {worst:.3g}, more than {bound:.3g}"


def rms_norm(rows: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    rows = rows.double()
    normalized = rows / (rows.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return normalized if weight is None else normalized * weight.double()


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    gate = gate.double()
    return gate / (1 + (-gate).exp()) * up.double()


def rotated(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """[T, h, d] by complex multiplication."""
    heads = heads.double()
    pairs = heads.unflatten(-1, (-1, 2)) if interleaved else torch.stack(heads.chunk(2, dim=-1), dim=-1)
    turned = torch.view_as_complex(pairs.contiguous()) * torch.complex(cos.double(), sin.double())
    real = torch.view_as_real(turned)
    return real.flatten(-2) if interleaved else torch.cat(real.unbind(-1), dim=-1)


def attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """One token's queries [h, d] on the keys and values [L, k, d] that it sees: [h, d]."""
    repeats = query.shape[0] // keys.shape[1]
    keys, values = (part.double().repeat_interleave(repeats, dim=1) for part in (keys, values))
    scores = torch.einsum("hd,lhd->hl", query.double(), keys) / query.shape[1] ** 0.5
    return torch.einsum("hl,lhd->hd", scores.softmax(dim=-1), values)
