"""Rotary position embedding (RoFormer, arXiv 2104.09864) and its stretched variants, as transformers computes them.

d head_dim, T tokens. Angles are taken in float32.
"""

import math
from dataclasses import dataclass

import torch

from engine.batch import ForwardBatch
from engine.kernels.elementwise import rotate_halves, rotate_pairs
from engine.rope_config import RopeConfig, RopeType

_VECTOR = 32
"""Numbers of float32, two vectors of them, which torch's kernels take together."""


@dataclass(frozen=True)
class Rotation:
    """Angles of one step's tokens: ``cos`` and ``sin`` [T, 1, d / 2] float32, attention factor included."""

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool

    def apply(self, heads: torch.Tensor) -> torch.Tensor:
        """Rotate queries or keys [T, num_heads, d]."""
        if self.interleaved:
            rotated = rotate_pairs(heads, self.cos, self.sin)
            return _rotate_pairs(heads, self.cos, self.sin) if rotated is None else rotated
        rotated = rotate_halves(heads, self.cos, self.sin)
        return _rotate_halves(heads, self.cos, self.sin) if rotated is None else rotated


class RotaryEmbedding:
    """Makes the rotation of a step from its positions."""

    def __init__(self, config: RopeConfig, device: torch.device) -> None:
        self._config = config
        frequencies, self._attention_factor = inverse_frequencies(config)
        self._frequencies = frequencies.to(device)

    def rotation(self, batch: ForwardBatch) -> Rotation:
        frequencies = self._frequencies
        if self._config.kind is RopeType.DYNAMIC:
            frequencies = _dynamic_frequencies(self._config, _context_lengths(batch))
        angles = batch.positions[:, None].float() * frequencies
        cos, sin = (angles.cos() * self._attention_factor, angles.sin() * self._attention_factor)
        return Rotation(cos[:, None], sin[:, None], self._config.interleaved)


def inverse_frequencies(config: RopeConfig) -> tuple[torch.Tensor, float]:
    """Radians per position, [d / 2] float32, and the factor on cos and sin.

    For dynamic NTK they are those of contexts up to the original length.
    """
    plain = _plain_frequencies(config)
    if config.kind is RopeType.LINEAR:
        return plain / config.factor, 1.0
    if config.kind is RopeType.LLAMA3:
        return _llama3_frequencies(config, plain), 1.0
    if config.kind is RopeType.YARN:
        return _yarn_frequencies(config), _yarn_attention_factor(config)
    return plain, 1.0


def _exponents(config: RopeConfig) -> torch.Tensor:
    return torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim


def _plain_frequencies(config: RopeConfig) -> torch.Tensor:
    frequencies = 1.0 / (config.theta ** _exponents(config))
    if config.frequency_divisors:
        frequencies /= torch.tensor(config.frequency_divisors, dtype=torch.float32)
    return frequencies


def _llama3_frequencies(config: RopeConfig, plain: torch.Tensor) -> torch.Tensor:
    """Llama 3.1: keep short wavelengths, divide long ones by the factor, interpolate between.

    With low_freq_factor = high_freq_factor (Llama 4 Scout) no wavelength is between; the division by zero there is
    never selected.
    """
    wavelengths = 2 * math.pi / plain
    longest_kept = config.original_max_positions / config.high_freq_factor
    shortest_divided = config.original_max_positions / config.low_freq_factor
    position = config.original_max_positions / wavelengths - config.low_freq_factor
    smooth = position / (config.high_freq_factor - config.low_freq_factor)
    between = (1 - smooth) * plain / config.factor + smooth * plain
    is_between = (wavelengths >= longest_kept) & (wavelengths <= shortest_divided)
    scaled = torch.where(wavelengths > shortest_divided, plain / config.factor, plain)
    return torch.where(is_between, between, scaled)


def _yarn_frequencies(config: RopeConfig) -> torch.Tensor:
    """YaRN (arXiv 2309.00071): fast dimensions extrapolate, slow ones interpolate, with a linear ramp between."""

    def dimension(num_rotations: float) -> float:
        """The dimension that turns so often over the original context."""
        ratio = config.original_max_positions / (num_rotations * 2 * math.pi)
        return config.head_dim * math.log(ratio) / (2 * math.log(config.theta))

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(config.head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    plain = _plain_frequencies(config)
    return plain / config.factor * ramp + plain * (1 - ramp)


def _yarn_attention_factor(config: RopeConfig) -> float:
    if config.attention_factor is not None:
        return config.attention_factor

    def scale(multiplier: float) -> float:
        return 1.0 if config.factor <= 1 else 0.1 * multiplier * math.log(config.factor) + 1.0

    if config.mscale and config.mscale_all_dim:
        return scale(config.mscale) / scale(config.mscale_all_dim)
    return scale(1.0)


def _context_lengths(batch: ForwardBatch) -> torch.Tensor:
    """[T, 1] float32: the context length that sets a token's dynamic frequencies.

    A prompt's tokens see the whole prompt, a generated token what is up to itself, as when transformers prefills the
    prompt at once and then decodes. So the keys do not depend on how a prompt was cut or whether it is replayed.
    """
    assert len(batch.prompt_lens) == len(batch.query_lens), "dynamic rotary embedding needs the prompts' lengths"
    device = batch.positions.device
    query_lens = torch.tensor(batch.query_lens, device=device)
    prompt_lens = torch.tensor(batch.prompt_lens, device=device).repeat_interleave(query_lens)
    return torch.maximum(batch.positions + 1, prompt_lens)[:, None].float()


def _dynamic_frequencies(config: RopeConfig, lengths: torch.Tensor) -> torch.Tensor:
    """Dynamic NTK: the base grows with the context beyond the original. ``lengths`` [T, 1]; returns [T, d / 2]."""
    original = config.original_max_positions
    ratio = lengths.clamp(min=original) / original
    growth = config.factor * ratio - (config.factor - 1)
    # A whole vector of each: torch's power of what is left over of vectors differs, and that depends on the batch.
    powers = growth.repeat(1, _VECTOR) ** (config.head_dim / (config.head_dim - 2))
    bases = config.theta * powers[:, :1]
    return 1.0 / (bases ** _exponents(config).to(lengths.device))


def _rotate_halves(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Element i turns with element i + d / 2, in the format of ``heads``."""
    cos, sin = cos.to(heads.dtype), sin.to(heads.dtype)
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _rotate_pairs(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Element 2i turns with element 2i + 1, in float32."""
    first, second = heads.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.flatten(-2).to(heads.dtype)
