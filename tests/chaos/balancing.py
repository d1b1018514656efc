"""Faults while experts are on their way between ranks."""

import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import httpx

from tests.chaos.cell import Choice, Row
from tests.chaos.clients import Client, run_all
from tests.chaos.comparison import judge
from tests.chaos.mix import short_prompts
from tests.chaos.processes import kill, stop
from tests.chaos.site import OneHost, Site, metric, one_host, settle

OPTIONS = ("--tp", "2", "--ep", "2", "--enable-eplb", "--num-redundant-experts", "2", "--spare-ranks", "1")
NUM_TOKENS = 240
MAX_WAVES = 8
"""Of requests, until loads have told the balancer that something should move."""
FAULTS: dict[str, tuple[Callable[[Site], None], str]] = {
    "kill -9 rank 1": (kill("rank 1"), "rank 1"),
    "SIGSTOP rank 0": (stop("rank 0"), "rank 0"),
    "kill -9 leader": (kill("leader"), "leader"),
}
"""Each with who is another one afterwards."""


REPEATED_TOKEN, NUM_REPEATED = 100, 400
"""Of prompts that want the same expert of a layer again and again."""


class StrikeAtMove:
    """Strikes when the first layer's experts have moved; those of the other layers follow. Until then it asks, beside
    the clients, for what makes some experts busier than others."""

    def __init__(self, site: OneHost, fault: Callable[[Site], None]) -> None:
        self.struck_s: float | None = None
        self._site = site
        self._fault = fault
        self._numbers = count()

    def __call__(self, clients: list[Client]) -> None:
        while any(client.is_alive() for client in clients):
            if metric(self._site.urls[0], "remuda_expert_moves_total"):
                self.struck_s = time.monotonic()
                self._fault(self._site)
                return
            self._ask_for_few_experts()

    def _ask_for_few_experts(self) -> None:
        body = {
            "model": "m",
            "prompt": [REPEATED_TOKEN] * NUM_REPEATED,
            "max_tokens": 1,
            "cache_salt": f"repeated {next(self._numbers)}",
        }
        httpx.post(f"{self._site.urls[0]}/v1/completions", json=body, timeout=60).raise_for_status()


def balancing(directory: Path, choice: Choice) -> Iterator[Row]:
    for number, (name, (fault, victim)) in enumerate(choice.of(list(FAULTS.items()))):
        yield _struck(directory / str(number), name, fault, victim)


def _struck(directory: Path, name: str, fault: Callable[[Site], None], victim: str) -> Row:
    """What is expected is asked for afterwards: answers do not depend on where experts are."""
    with one_host(directory, *OPTIONS) as site:
        before = settle(site)
        strike = StrikeAtMove(site, fault)
        waves = 0
        while strike.struck_s is None and waves < MAX_WAVES:
            waves += 1
            clients = run_all(short_prompts(NUM_TOKENS), site.urls, None, strike)
        after = settle(site)
        expected = {client.name: client.reading for client in run_all(short_prompts(NUM_TOKENS), site.urls)}
        outcome = judge(clients, expected, strike.struck_s or 0.0)
        replaced = tuple(name for name in before if before[name] != after[name])
        wrong = list(outcome.notes)
        wrong += [f"{name}, without a fault: {one.errors}" for name, one in expected.items() if not one.is_done]
        if strike.struck_s is None:
            wrong.append("no experts moved")
        elif replaced != (victim,):
            wrong.append(f"replaced: {replaced}")
        return Row("tp2 ep2", name, "rebalancing", outcome, replaced, tuple(wrong))
