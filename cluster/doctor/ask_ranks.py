"""Lets the ranks of a gang measure the links between them."""

from collections.abc import Sequence
from contextlib import ExitStack, closing

import msgspec

from cluster.control.host_calls import HostCall, HostCalls
from cluster.control.placement import HostInfo
from cluster.doctor.facts import LinkFacts, RankFacts, RankQuestion
from cluster.doctor.follow_rounds import Tell, rounds_followed
from cluster.doctor.rounds import measuring_rounds
from cluster.replica.rendezvous import Rendezvous

_START_TIMEOUT_S = 60.0
_ROUND_TIMEOUT_S = 5.0
_MEASURE = "cluster.doctor.measure_links:measure_rank"


def ask_ranks(
    calls: HostCalls,
    gangs: Sequence[Sequence[HostInfo]],
    *,
    on_gpus: bool,
    tcp_only: bool = False,
    tell: Tell | None = None,
) -> tuple[list[RankFacts], list[LinkFacts]]:
    """What each rank says of its device, and the link of every pair in a gang. One of which nobody told has an error.

    Args:
        gangs: each rank's host; ranks are numbered through all gangs.
        tcp_only: links between hosts alone, without collectives over them.
        tell: hears how far the measurement is.
    """
    placed = [host for gang in gangs for host in gang]
    addresses = tuple(host.address for host in placed)
    rounds = measuring_rounds([[host.address for host in gang] for gang in gangs])
    with ExitStack() as stack:
        store = stack.enter_context(closing(Rendezvous(calls.host)))
        if tell is not None:
            stack.enter_context(rounds_followed(store, len(rounds), tell))
        asked = [
            RankQuestion(rank, addresses, on_gpus, store.host, store.port, rounds, tcp_only)
            for rank in range(len(placed))
        ]
        answers = calls.call(
            [
                HostCall(host, _MEASURE, msgspec.msgpack.encode(question), on_gpu=on_gpus)
                for host, question in zip(placed, asked, strict=True)
            ],
            _START_TIMEOUT_S + _ROUND_TIMEOUT_S * len(rounds),
        )
    ranks = [msgspec.msgpack.decode(answer.value, type=RankFacts) for answer in answers if answer.error is None]
    errors = {rank: answer.error for rank, answer in enumerate(answers) if answer.error is not None}
    told = {(link.first, link.second): link for rank in ranks for link in rank.links}
    links = []
    for first, second in sorted(pair for pairs in rounds for pair in pairs):
        why = next((f"rank {rank} {errors[rank]}" for rank in (first, second) if rank in errors), "nothing was told")
        links.append(told.get((first, second)) or LinkFacts(first, second, error=why))
    return ranks, links
