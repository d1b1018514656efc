"""One cell of the table: a fault, the moment at which it strikes, and what must be true afterwards."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from tests.chaos.clients import Client, run_all
from tests.chaos.comparison import Outcome, judge
from tests.chaos.mix import long_prompts, short_prompts
from tests.chaos.site import POLL_S, NotSettled, Site, live_requests, settle
from tests.failover.streams import Reading

BEGIN_TIMEOUT_S = 60.0
TOKENS_BEFORE = 20

T = TypeVar("T")
Expected = dict[str, dict[str, Reading]]
"""Moment → request → its answer without a fault."""


class Choice:
    """Which cells of a group are run: those with these numbers, from 1; none: all."""

    def __init__(self, *numbers: int) -> None:
        self._numbers = numbers

    def of(self, cells: Sequence[T]) -> list[T]:
        """Raises ValueError where there is no such cell."""
        if missing := [number for number in self._numbers if not 1 <= number <= len(cells)]:
            raise ValueError(f"no cell {missing[0]}: this group has {len(cells)}")
        return [cells[number - 1] for number in self._numbers] or list(cells)


class Moment:
    """When a fault strikes. ``has_come`` is asked again and again."""

    DECODE = "decode"
    PREFILL = "prefill"

    @staticmethod
    def bodies(moment: str) -> dict[str, dict[str, Any]]:
        return long_prompts() if moment == Moment.PREFILL else short_prompts()

    @staticmethod
    def streams(moment: str) -> dict[str, dict[str, Any]]:
        """Those of them that are streamed."""
        return {name: body for name, body in Moment.bodies(moment).items() if body.get("stream", True)}

    @staticmethod
    def has_come(moment: str, num_live: Callable[[], int], clients: list[Client]) -> bool:
        """Decode: every stream has had tokens. Prefill: all requests are in, and most have had none."""
        if moment == Moment.PREFILL:
            return num_live() >= len(clients)
        return all(client.reading.num_tokens >= TOKENS_BEFORE for client in clients if client.is_streamed)


@dataclass(frozen=True)
class Cell:
    """``strike``: carries the fault out, and ends it where it is one that ends. ``replaced``: exactly those processes
    have to be others afterwards. ``url``: of the clients' front end; None: the cluster's own."""

    fault: str
    moment: str
    strike: Callable[[Site], object]
    replaced: frozenset[str] = frozenset()
    url: str | None = None


@dataclass(frozen=True)
class Row:
    """What came of a cell."""

    site: str
    fault: str
    moment: str
    outcome: Outcome
    replaced: tuple[str, ...]
    """Those whose process is another one."""
    wrong: tuple[str, ...] = ()
    """Everything that should not be."""


class Strike:
    """Waits for the moment, then calls ``fault``.

    Attributes:
        struck_s: when that was.
        wrong: whether the moment was missed.
    """

    def __init__(self, moment: str, num_live: Callable[[], int], fault: Callable[[], object]) -> None:
        self.struck_s = 0.0
        self.wrong: list[str] = []
        self._moment = moment
        self._num_live = num_live
        self._fault = fault

    def __call__(self, clients: list[Client]) -> None:
        deadline_s = time.monotonic() + BEGIN_TIMEOUT_S
        while not Moment.has_come(self._moment, self._num_live, clients):
            if time.monotonic() > deadline_s:
                self.wrong.append("the moment did not come")
                return
            time.sleep(POLL_S / 5)
        self.struck_s = time.monotonic()
        begun = sum(bool(client.reading.num_tokens) for client in clients)
        if self._moment == Moment.PREFILL and begun > len(clients) / 2:
            self.wrong.append(f"{begun} requests were prefilled already")
        if all(not client.is_alive() for client in clients):
            self.wrong.append("all requests had ended")
        self._fault()


def moments_of(cells: Sequence[Cell]) -> tuple[str, ...]:
    """Each once."""
    return tuple(dict.fromkeys(cell.moment for cell in cells))


def unfaulted(site: Site, moments: tuple[str, ...] = (Moment.DECODE, Moment.PREFILL)) -> tuple[Expected, list[Row]]:
    """What the cluster answers when nothing happens, and the row that shows how long its pauses are then."""
    expected: Expected = {}
    rows = []
    for moment in moments:
        clients = run_all(Moment.bodies(moment), site.urls, site.network)
        expected[moment] = {client.name: client.reading for client in clients}
        wrong = [f"{c.name}: {c.failure or c.reading.errors}" for c in clients if c.failure or c.reading.errors]
        outcome = judge(clients, expected[moment], 0.0)
        rows.append(Row("", "none", moment, outcome, (), (*wrong, *outcome.notes)))
    return expected, rows


def run_cell(name: str, site: Site, cell: Cell, expected: Expected) -> Row:
    """Strike while all requests run; wait for their ends, and until the cluster is whole again. Raises NotSettled
    where it was not whole before."""
    before = settle(site)
    urls, num_live = site.urls, site.num_live
    if cell.url is not None:
        urls, num_live = [cell.url], partial(live_requests, cell.url)
    strike = Strike(cell.moment, num_live, lambda: cell.strike(site))
    clients = run_all(Moment.bodies(cell.moment), urls, site.network, strike)
    outcome = judge(clients, expected[cell.moment], strike.struck_s)
    wrong = list(strike.wrong)
    try:
        after = settle(site)
    except NotSettled as error:
        return Row(name, cell.fault, cell.moment, outcome, (), (*wrong, *outcome.notes, str(error)))
    replaced = tuple(sorted(name for name in before if after[name] != before[name]))
    if set(replaced) != cell.replaced:
        wrong.append(f"replaced: {', '.join(replaced) or 'nobody'}, not {', '.join(sorted(cell.replaced)) or 'nobody'}")
    return Row(name, cell.fault, cell.moment, outcome, replaced, (*wrong, *outcome.notes))
