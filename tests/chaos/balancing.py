"""A rank is killed while experts are on their way between ranks."""

import time
from collections.abc import Iterator
from pathlib import Path

from tests.chaos.cell import Moment, Row, unfaulted
from tests.chaos.clients import Client, run_all
from tests.chaos.comparison import judge
from tests.chaos.mix import short_prompts
from tests.chaos.processes import kill
from tests.chaos.site import POLL_S, OneHost, metric, one_host, pids, settle

OPTIONS = ("--tp", "2", "--ep", "2", "--enable-eplb", "--num-redundant-experts", "4", "--spare-ranks", "1")
MAX_WAVES = 6
"""Of requests, until loads have told the balancer that something should move."""


class StrikeAtMove:
    """Kills a rank when the first layer's experts have moved; those of the other layers follow."""

    def __init__(self, site: OneHost) -> None:
        self.struck_s: float | None = None
        self._site = site

    def __call__(self, clients: list[Client]) -> None:
        while any(client.is_alive() for client in clients):
            if metric(self._site.urls[0], "remuda_expert_moves_total"):
                self.struck_s = time.monotonic()
                kill("rank 1")(self._site)
                return
            time.sleep(POLL_S)


def balancing(directory: Path) -> Iterator[Row]:
    """What is expected is asked for afterwards: answers do not depend on where experts are."""
    with one_host(directory, *OPTIONS) as site:
        before = settle(site)
        strike = StrikeAtMove(site)
        waves = 0
        while strike.struck_s is None and waves < MAX_WAVES:
            waves += 1
            clients = run_all(short_prompts(), site.urls, None, strike)
        settle(site)
        after = pids(site)
        expected, rows = unfaulted(site, (Moment.DECODE,))
        outcome = judge(clients, expected[Moment.DECODE], strike.struck_s or 0.0)
        replaced = tuple(name for name in before if before[name] != after[name])
        wrong = [note for row in rows for note in row.wrong] + list(outcome.notes)
        if strike.struck_s is None:
            wrong.append("no experts moved")
        elif replaced != ("rank 1",):
            wrong.append(f"replaced: {replaced}")
        yield Row("tp2 ep2", "kill -9 rank 1", "rebalancing", outcome, replaced, tuple(wrong))
