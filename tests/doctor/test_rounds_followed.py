"""Whoever waits for the measurement of links sees how far it is."""

import io
import queue

from rich.console import Console

from cluster.cli.doctor import rounds_shown
from cluster.doctor.follow_rounds import rounds_followed
from cluster.doctor.rounds import begun_key
from cluster.replica.rendezvous import Rendezvous
from engine.parallel.store import connect_store

HOST = "127.0.0.1"


def test_each_round_is_told_when_its_ranks_have_met_and_the_end_of_the_ranks_is_the_end() -> None:
    told: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
    store = Rendezvous(HOST)
    with rounds_followed(store, 3, lambda done, rounds: told.put((done, rounds))):
        client = connect_store(HOST, store.port, 30.0)
        for number in range(2):
            client.set(begun_key(number), "")
            assert told.get(timeout=30) == (number, 3)
    # The third round never begins: a rank was lost.
    assert told.empty()
    store.close()


def test_where_nobody_watches_one_line_says_how_many_rounds_there_are() -> None:
    output = io.StringIO()
    with rounds_shown(Console(file=output)) as show:
        for done in range(3):
            show(done, 92)
    assert output.getvalue() == "measuring links in 92 rounds\n"


def test_on_a_terminal_a_bar_has_the_rounds() -> None:
    output = io.StringIO()
    with rounds_shown(Console(file=output, force_terminal=True, width=80)) as show:
        show(46, 92)
    assert "46/92" in output.getvalue()
