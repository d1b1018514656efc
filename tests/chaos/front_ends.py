"""Clients of a front end beside ``remuda serve``: it is killed, and they come back to that of ``remuda serve``; or the
leader is, and the front end finds the one that takes its place at the same address."""

import dataclasses
import secrets
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from tests.chaos.cell import Cell, Choice, Expected, Moment, Row, Strike, run_cell, unfaulted
from tests.chaos.clients import run_all
from tests.chaos.comparison import judge
from tests.chaos.processes import OPTIONS, kill, only
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
            if fault == FRONT_END:
                yield _lose_front_end(site, beside, moment, expected)
            else:
                yield run_cell("tp2", site, Cell(LEADER, moment, kill("leader"), only("leader"), beside.url), expected)


def _lose_front_end(site: OneHost, victim: FrontEndProcess, moment: str, expected: Expected) -> Row:
    """Only streams can be gone on with, so only they are asked for."""
    before = settle(site)
    strike = Strike(moment, partial(live_requests, victim.url), victim.process.kill)
    clients = run_all(Moment.streams(moment), [victim.url, *site.urls], None, strike)
    outcome = judge(clients, expected[moment], strike.struck_s)
    wrong = [f"{client.name}: never came back" for client in clients if client.num_connections < 2]
    if settle(site) != before:
        wrong.append("more than a front end was replaced")
    return Row("tp2", FRONT_END, moment, outcome, ("front end",), (*wrong, *strike.wrong, *outcome.notes))
