"""A front end is killed: its clients come back to another one, that of ``remuda serve``."""

import dataclasses
import secrets
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from tests.chaos.cell import Choice, Moment, Row, Strike, unfaulted
from tests.chaos.clients import run_all
from tests.chaos.comparison import judge
from tests.chaos.processes import OPTIONS
from tests.chaos.site import live_requests, one_host, settle
from tests.failover.processes import front_end, wait_ready


def front_ends(directory: Path, choice: Choice) -> Iterator[Row]:
    """Only streams can be gone on with, so only they are asked for."""
    moments = choice.of((Moment.DECODE, Moment.PREFILL))
    secret = directory / "secret"
    secret.write_text(secrets.token_hex(32))
    with ExitStack() as stack:
        site = stack.enter_context(one_host(directory, *OPTIONS, "--secret-file", str(secret)))
        expected, rows = unfaulted(site, tuple(moments))
        yield from (dataclasses.replace(row, site="tp2") for row in rows)
        leader = f"r0={site.status()['address']}"
        for moment in moments:
            before = settle(site)
            log = directory / f"front-end-{moment}.log"
            victim = front_end(stack, leader, log, "--secret-file", str(secret))
            wait_ready(victim, 1)
            urls = [victim.url, *site.urls]
            strike = Strike(moment, partial(live_requests, victim.url), victim.process.kill)
            clients = run_all(Moment.streams(moment), urls, None, strike)
            outcome = judge(clients, expected[moment], strike.struck_s)
            wrong = [f"{client.name}: never came back" for client in clients if client.num_connections < 2]
            if settle(site) != before:
                wrong.append("more than a front end was replaced")
            notes = (*wrong, *strike.wrong, *outcome.notes)
            yield Row("tp2", "kill -9 front end", moment, outcome, ("front end",), notes)
