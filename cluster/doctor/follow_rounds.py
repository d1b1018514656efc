"""Tells how far ranks are with measuring, which takes seconds for each of many rounds."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from cluster.doctor.rounds import begun_key
from cluster.replica.rendezvous import Rendezvous
from engine.parallel.store import connect_store

Tell = Callable[[int, int], None]
"""Called with the rounds that are done, and how many there are in all; from another thread."""
_CONNECT_TIMEOUT_S = 30.0
_LOOK_S = 0.5
"""How long its end may take after that of the ranks."""


@contextmanager
def rounds_followed(store: Rendezvous, num_rounds: int, tell: Tell) -> Iterator[None]:
    """While ranks meet in ``store``: ``tell`` hears of each round that they begin."""
    ended = threading.Event()
    thread = threading.Thread(target=_follow, args=(store, num_rounds, tell, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _follow(store: Rendezvous, num_rounds: int, tell: Tell, ended: threading.Event) -> None:
    client = connect_store(store.host, store.port, _CONNECT_TIMEOUT_S)
    for number in range(num_rounds):
        while not _has_begun(client, number):
            if ended.is_set():
                return
        tell(number, num_rounds)


def _has_begun(client: dist.TCPStore, number: int) -> bool:
    try:
        client.wait([begun_key(number)], timedelta(seconds=_LOOK_S))
    except RuntimeError:  # Not yet; whether there is still anybody to come, the caller knows.
        return False
    return True
