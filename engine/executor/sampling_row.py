"""What the sampler has to know of one row of logits."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.executor.seen_tokens import SeenTokens
from engine.request import SamplingParams


@dataclass(frozen=True, slots=True)
class GrammarMask:
    """What a row's grammar allows. ``allowed`` [vocab]; ``only_ends``: nothing but stop tokens."""

    allowed: npt.NDArray[np.bool_]
    only_ends: bool


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """``token_ids``: everything before the token to be sampled, prompt first. The new one's position is its length.

    ``seen``: what penalties found in it in earlier steps, for a caller that keeps it; None: they look at all of it.
    """

    slot: int
    params: SamplingParams
    token_ids: Sequence[int]
    num_prompt_tokens: int
    mask: GrammarMask | None = None
    seen: SeenTokens | None = None

    @property
    def position(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens
