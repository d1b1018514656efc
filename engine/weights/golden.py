"""The golden file of a checkpoint: tokens and log-probabilities that its model once gave. Torch-free.

A replica reproduces them before it serves (docs/self_test.md); ``remuda verify --golden`` records them.
"""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from engine.config import Dtype
from engine.errors import CheckpointError
from engine.weights.manifest import GOLDEN_FILE, write_whole

TOLERANCES = {Dtype.FLOAT32: 0.02, Dtype.BFLOAT16: 0.5}
"""By how much a log-probability (natural) may differ between two layouts or devices in this format."""


class GoldenStep(msgspec.Struct, frozen=True):
    """One generated token, and (token id, log-probability) of the most likely ones there, best first."""

    token_id: int
    top: list[tuple[int, float]]


class GoldenPrompt(msgspec.Struct, frozen=True):
    """``steps``: what followed the prompt, greedily."""

    text: str
    token_ids: list[int]
    steps: list[GoldenStep]

    @property
    def continuation(self) -> list[int]:
        return [step.token_id for step in self.steps]


class Golden(msgspec.Struct, frozen=True):
    """``checkpoint``: its identity (engine.weights.identity). The rest says how it was recorded; ``quantization`` is
    what was done to the weights while loading."""

    checkpoint: str
    dtype: Dtype
    quantization: str | None
    device: str
    layout: dict[str, int]
    prompts: list[GoldenPrompt]
    version: Literal[1] = 1


def golden_path(checkpoint: Path) -> Path:
    """Inside a directory, beside a single file."""
    if checkpoint.is_dir():
        return checkpoint / GOLDEN_FILE
    return checkpoint.with_name(f"{checkpoint.name}.{GOLDEN_FILE}")


def read_golden(checkpoint: Path) -> Golden | None:
    """None where there is no golden file. Raises CheckpointError where it is none."""
    path = golden_path(checkpoint)
    try:
        golden = msgspec.json.decode(path.read_bytes(), type=Golden)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a golden file: {error}; delete it or record it anew") from error
    if not golden.prompts or not all(_is_sound(prompt) for prompt in golden.prompts):
        raise CheckpointError(f"{path} contradicts itself; delete it or record it anew with remuda verify --golden")
    return golden


def write_golden(checkpoint: Path, golden: Golden) -> Path:
    """All or nothing. Raises CheckpointError where it cannot be written."""
    path = golden_path(checkpoint)
    try:
        write_whole(path, msgspec.json.format(msgspec.json.encode(golden), indent=0) + b"\n")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}") from error
    return path


def _is_sound(prompt: GoldenPrompt) -> bool:
    ids = [*prompt.token_ids, *prompt.continuation, *(token_id for step in prompt.steps for token_id, _ in step.top)]
    values = [value for step in prompt.steps for _, value in step.top]
    return (
        bool(prompt.token_ids and prompt.steps)
        and min(ids) >= 0
        and all(map(math.isfinite, values))
        and all(step.top and step.top[0][1] == max(value for _, value in step.top) for step in prompt.steps)
    )


def fault_of(expected: GoldenStep, found: GoldenStep, tolerance: float) -> str | None:
    """What is wrong with ``found``, as "expected …, found …"; None where it is what was expected, up to near-ties.

    Each recorded token must have its log-probability within ``tolerance``; of one that is not among those found, no
    more is known than that it is not above the least of them. Another token may have been chosen where it was within
    twice the tolerance of the best: both may have moved.
    """
    values = [value for _, value in found.top]
    if not values or not all(map(math.isfinite, values)):
        return "expected finite logits, found others"
    of_found = dict(found.top)
    for token_id, logprob in expected.top:
        value = of_found.get(token_id, min(logprob, values[-1]))
        if abs(value - logprob) > tolerance:
            less = "" if token_id in of_found else "at most "
            return f"expected log-probability {logprob:.3f} of token {token_id}, found {less}{value:.3f}"
    if found.token_id != expected.token_id:
        least = expected.top[0][1] - 2 * tolerance
        if dict(expected.top).get(found.token_id, -math.inf) < least:
            return f"expected token {expected.token_id}, found {found.token_id}"
    return None


def num_equal(expected: Sequence[int], found: Sequence[int]) -> int:
    """Length of the common beginning."""
    pairs = zip(expected, found, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
