"""The load that a benchmark puts on a server: how many requests at a time, how long, and what they share."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

CASE_FORM = re.compile(r"(c|long|shared)([1-9][0-9]*)")


@dataclass(frozen=True)
class LoadCase:
    """``num_concurrent`` clients in a closed loop, each request a random prompt after what all of them share."""

    name: str
    num_concurrent: int
    num_shared_tokens: int
    num_own_tokens: int
    num_output_tokens: int


def parse_case(name: str) -> LoadCase:
    """``cN``: 128 in, 64 out; ``longN``: 1024 in, 32 out; ``sharedN``: 768 shared and 64 own in, 32 out; N at once."""
    form = CASE_FORM.fullmatch(name)
    if form is None:
        raise ValueError(f"load case {name!r}: use cN, longN or sharedN, N requests at a time, as in c8")
    kind, num_concurrent = form[1], int(form[2])
    num_shared, num_own, num_output = {"c": (0, 128, 64), "long": (0, 1024, 32), "shared": (768, 64, 32)}[kind]
    return LoadCase(name, num_concurrent, num_shared, num_own, num_output)


class PromptMaker:
    """Random prompts of one repetition; what they share is drawn anew in each, so that no cache knows it already."""

    def __init__(self, case: LoadCase, token_ids: Sequence[int], generator: random.Random) -> None:
        self._case = case
        self._token_ids = token_ids
        self._generator = generator
        self._shared = self._draw(case.num_shared_tokens)

    def prompt(self) -> list[int]:
        return self._shared + self._draw(self._case.num_own_tokens)

    def _draw(self, num_tokens: int) -> list[int]:
        return self._generator.choices(self._token_ids, k=num_tokens)
