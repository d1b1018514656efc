"""Bounds that an answer must keep to count as good: goodput is the rate of those that do."""

import re
from dataclasses import dataclass, fields

from cluster.bench.timing import Timing
from engine.errors import InvalidOption

_BOUND = re.compile(r"(?P<name>\w+)=(?P<number>\d+(?:\.\d+)?)(?P<unit>ms|s)")


@dataclass(frozen=True)
class Slo:
    """Upper bounds in seconds, None where there is none."""

    ttft: float | None = None
    """Time to the first token."""
    itl: float | None = None
    """Time per token after the first, the request's mean."""
    max_itl: float | None = None
    """The request's longest pause between two chunks."""
    e2e: float | None = None
    """From sending to the end of the answer."""

    def is_met(self, timing: Timing) -> bool:
        measured = (timing.ttft_s, timing.token_s or 0.0, max(timing.gaps_s, default=0.0), timing.total_s)
        bounds = (self.ttft, self.itl, self.max_itl, self.e2e)
        return all(bound is None or value <= bound for value, bound in zip(measured, bounds, strict=True))


def parse_slo(text: str) -> Slo:
    """``ttft=500ms,itl=50ms``. Raises InvalidOption."""
    known = [field.name for field in fields(Slo)]
    bounds: dict[str, float] = {}
    for part in text.split(","):
        bound = _BOUND.fullmatch(part.strip())
        if bound is None or bound["name"] not in known:
            raise InvalidOption(
                f"--slo {part.strip()}: write NAME=TIME with one of {', '.join(known)}, as in ttft=500ms,itl=0.05s"
            )
        if bound["name"] in bounds:
            raise InvalidOption(f"--slo {text}: {bound['name']} is given twice")
        bounds[bound["name"]] = float(bound["number"]) / (1000 if bound["unit"] == "ms" else 1)
    return Slo(**bounds)
