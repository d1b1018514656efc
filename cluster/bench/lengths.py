"""How long prompts and answers are: always the same, or drawn from a distribution."""

import math
import random
import re
from dataclasses import dataclass

from engine.errors import InvalidOption

MAX_LENGTH = 16_384
"""Longest draw of a lognormal mix where none is given: its tail has no end, a model's context has."""

SHAREGPT_MEANS = {"--prompt-len": 161.31, "--output-len": 337.99}
"""Mean lengths of ShareGPT conversations by the PagedAttention paper (Kwon et al., 2023)."""
_SHAREGPT_SIGMA = 1.0

_FORMS = re.compile(
    r"(?P<low>\d+)(?:-(?P<high>\d+))?|lognormal:(?P<median>\d+),(?P<sigma>\d+(?:\.\d+)?)(?:,(?P<most>\d+))?"
)


@dataclass(frozen=True)
class Lengths:
    """Between ``low`` and ``high`` tokens; uniform, or lognormal with ``median`` and ``sigma`` (of the logarithm)."""

    low: int
    high: int
    median: float = 0.0
    sigma: float = 0.0

    def draw(self, generator: random.Random) -> int:
        if not self.sigma:
            return generator.randint(self.low, self.high)
        length = round(generator.lognormvariate(math.log(self.median), self.sigma))
        return min(max(length, self.low), self.high)


def parse_lengths(option: str, text: str) -> Lengths:
    """``128``, ``64-256`` (uniform), ``lognormal:MEDIAN,SIGMA[,MOST]`` or ``sharegpt``. ``option``: for the message.

    Raises InvalidOption.
    """
    if text == "sharegpt":
        mean = SHAREGPT_MEANS[option]
        return Lengths(1, MAX_LENGTH, mean / math.exp(_SHAREGPT_SIGMA**2 / 2), _SHAREGPT_SIGMA)
    form = _FORMS.fullmatch(text)
    if form is None:
        raise InvalidOption(f"{option} {text}: write 128, 64-256, lognormal:MEDIAN,SIGMA[,MOST] or sharegpt")
    if form["median"]:
        found = Lengths(1, int(form["most"] or MAX_LENGTH), float(form["median"]), float(form["sigma"]))
        if not found.sigma or not found.median:
            raise InvalidOption(
                f"{option} {text}: MEDIAN and SIGMA must be above 0; write {form['median']} for one length"
            )
    else:
        found = Lengths(int(form["low"]), int(form["high"] or form["low"]))
    if not 1 <= found.low <= found.high:
        raise InvalidOption(f"{option} {text}: lengths are at least 1, and the second is not below the first")
    return found
