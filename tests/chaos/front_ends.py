"""A front end is killed: its clients come back to another one."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.chaos.cell import Expected, Moment, Row, Strike
from tests.chaos.clients import run_all
from tests.chaos.comparison import judge
from tests.chaos.site import live_requests
from tests.failover.processes import cluster_of


def front_ends(directory: Path) -> Iterator[Row]:
    """Of one leader's. Only streams can be gone on with, so only they are asked for."""
    name = "a leader, two front ends"
    for moment in (Moment.DECODE, Moment.PREFILL):
        below = directory / moment
        below.mkdir()
        with cluster_of(1, 2, below) as cluster:
            first, second = cluster.front_ends
            urls = [first.url, second.url]
            bodies = Moment.streams(moment)
            whole = run_all(bodies, [second.url])
            expected: Expected = {moment: {client.name: client.reading for client in whole}}
            wrong = [f"{client.name}: {client.failure}" for client in whole if not client.reading.is_done]
            strike = Strike(moment, partial(live_requests, first.url), first.process.kill)
            clients = run_all(Moment.streams(moment), urls, None, strike)
            outcome = judge(clients, expected[moment], strike.struck_s)
            wrong += [f"{client.name}: never came back" for client in clients if client.num_connections < 2]
            notes = (*wrong, *strike.wrong, *outcome.notes)
            yield Row(name, "kill -9 front end", moment, outcome, ("front end",), notes)
