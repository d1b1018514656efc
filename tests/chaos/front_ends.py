"""Clients of a front end beside ``remuda serve``: it is killed, and they come back to that of ``remuda serve``; or the
leader is, and the front end finds the one that takes its place at the same address."""

import dataclasses
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from tests.chaos.cell import Choice, Expected, Moment, Row, Strike, unfaulted
from tests.chaos.clients import Client, run_all
from tests.chaos.comparison import judge
from tests.chaos.processes import OPTIONS, kill
from tests.chaos.site import OneHost, live_requests, one_host, settle
from tests.failover.processes import FrontEndProcess, front_end, wait_ready

FRONT_END, LEADER = "kill -9 front end", "kill -9 leader of another's front end"
CELLS = [(fault, moment) for fault in (FRONT_END, LEADER) for moment in (Moment.DECODE, Moment.PREFILL)]


def front_ends(directory: Path, choice: Choice) -> Iterator[Row]:
    cells = choice.of(CELLS)
    secret = directory / "secret"
    secret.write_text(secrets.token_hex(32))
    with ExitStack() as stack:
        site = stack.enter_context(one_host(directory, *OPTIONS, "--secret-file", str(secret)))
        expected, rows = unfaulted(site, tuple(dict.fromkeys(moment for _, moment in cells)))
        yield from (dataclasses.replace(row, site="tp2") for row in rows)
        leader = f"r0={site.status()['address']}"
        for number, (fault, moment) in enumerate(cells):
            log = directory / f"front-end-{number}.log"
            beside = front_end(stack, leader, log, "--secret-file", str(secret))
            wait_ready(beside, 1)
            run = _lose_front_end if fault == FRONT_END else _lose_leader
            yield run(site, beside, moment, expected)


def _lose_front_end(site: OneHost, victim: FrontEndProcess, moment: str, expected: Expected) -> Row:
    """Only streams can be gone on with, so only they are asked for."""
    before = settle(site)
    clients, row = _struck(Moment.streams(moment), [victim.url, *site.urls], victim.process.kill, moment, expected)
    wrong = [f"{client.name}: never came back" for client in clients if client.num_connections < 2]
    if settle(site) != before:
        wrong.append("more than a front end was replaced")
    return dataclasses.replace(row, fault=FRONT_END, replaced=("front end",), wrong=(*wrong, *row.wrong))


def _lose_leader(site: OneHost, beside: FrontEndProcess, moment: str, expected: Expected) -> Row:
    before = settle(site)
    _, row = _struck(Moment.bodies(moment), [beside.url], partial(kill("leader"), site), moment, expected)
    after = settle(site)
    replaced = tuple(name for name in before if before[name] != after[name])
    wrong = [] if replaced == ("leader",) else [f"replaced: {replaced}"]
    return dataclasses.replace(row, fault=LEADER, replaced=replaced, wrong=(*wrong, *row.wrong))


def _struck(
    bodies: dict[str, dict[str, object]], urls: list[str], fault: Callable[[], object], moment: str, expected: Expected
) -> tuple[list[Client], Row]:
    """At that moment of the requests at the first of ``urls``."""
    strike = Strike(moment, partial(live_requests, urls[0]), fault)
    clients = run_all(bodies, urls, None, strike)
    outcome = judge(clients, expected[moment], strike.struck_s)
    return clients, Row("tp2", "", moment, outcome, (), (*strike.wrong, *outcome.notes))
