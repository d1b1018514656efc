"""What ``remuda bench`` can be told."""

from dataclasses import dataclass
from pathlib import Path

import msgspec

from cluster.bench.arrivals import Arrivals
from cluster.bench.lengths import Lengths
from cluster.bench.slo import Slo
from engine.errors import InvalidOption

_DEFAULT_NUM_REQUESTS = 100


@dataclass(frozen=True)
class Amount:
    """How much load, and how long. Exactly one of ``rate`` (requests a second) and ``concurrency`` is given, and
    exactly one of ``num_requests`` and ``duration_s``."""

    rate: float | None
    arrivals: Arrivals
    concurrency: int | None
    num_requests: int | None
    duration_s: float | None

    @property
    def words(self) -> str:
        if self.rate is not None:
            return f"{self.rate:g} requests/s ({self.arrivals})"
        return f"{self.concurrency} at a time"


@dataclass(frozen=True)
class BenchOptions:
    """``token_ids``: prompts are drawn from them; where there are none, prompts are words."""

    target: str
    model: str
    chat: bool
    amount: Amount
    prompt_len: Lengths
    output_len: Lengths
    shared_prefix_len: int
    num_prefixes: int
    token_ids: tuple[int, ...]
    seed: int
    num_warm_up: int
    slo: Slo | None
    ignore_eos: bool
    api_key: str | None


def parse_amount(
    rate: float | None, arrivals: str, concurrency: int | None, num_requests: int | None, duration_s: float | None
) -> Amount:
    """One client and 100 requests by default. Raises InvalidOption."""
    if rate is not None and concurrency is not None:
        raise InvalidOption("--rate and --concurrency: give one of them")
    if num_requests is not None and duration_s is not None:
        raise InvalidOption("--num-requests and --duration: give one of them")
    for option, value in (("--rate", rate), ("--duration", duration_s)):
        if value is not None and not 0 < value < float("inf"):
            raise InvalidOption(f"{option} {value:g}: give a number above 0")
    if arrivals not in list(Arrivals):
        raise InvalidOption(f"--arrivals {arrivals}: write {' or '.join(Arrivals)}")
    if rate is None and concurrency is None:
        concurrency = 1
    if num_requests is None and duration_s is None:
        num_requests = _DEFAULT_NUM_REQUESTS
    return Amount(rate, Arrivals(arrivals), concurrency, num_requests, duration_s)


def read_token_ids(file: Path | None) -> tuple[int, ...]:
    """A JSON list of them; none without a file. Raises InvalidOption."""
    if file is None:
        return ()
    try:
        ids = msgspec.json.decode(file.read_bytes(), type=tuple[int, ...])
    except (OSError, msgspec.DecodeError) as error:
        raise InvalidOption(f"--token-ids {file} is no JSON list of token ids: {error}") from error
    if not ids:
        raise InvalidOption(f"--token-ids {file} is empty")
    return ids
