"""Faults of hosts and links under a gang that spans two hosts."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from tests.chaos.cell import Cell, Choice, Moment, Row, moments_of, run_cell, unfaulted
from tests.chaos.comparison import Outcome, ask_once
from tests.chaos.several_hosts import RayHosts, SeveralHosts, ray_hosts, several_hosts
from tests.chaos.site import Site, gang_of, replaced_since, settle
from tests.support.hosts.host import Host

NAME = "tp2 over two hosts"
SHORT_S, LONG_S = 2.0, 30.0
DELAY_MS, DELAYED_S = 200.0, 5.0

Fault = Callable[[SeveralHosts, Host], None]
"""Of the host that has rank 1. Ends it where it is one that ends."""


def link_down(seconds: float) -> Fault:
    def fault(site: SeveralHosts, host: Host) -> None:
        site.bed.network.cut(host)
        time.sleep(seconds)  # the fault itself
        site.bed.network.heal(host)

    return fault


def silence(seconds: float) -> Fault:
    """All packets are lost, and nobody is told."""

    def fault(site: SeveralHosts, host: Host) -> None:
        site.bed.network.partition([host], [other for other in site.bed.hosts if other is not host])
        time.sleep(seconds)  # the fault itself
        site.bed.network.reunite()

    return fault


def slow_link(site: SeveralHosts, host: Host) -> None:
    site.bed.network.delay(host, DELAY_MS)
    time.sleep(DELAYED_S)  # the fault itself
    site.bed.network.delay(host, 0)


def kill_raylet(site: SeveralHosts, host: Host) -> None:
    kill_raylet_of(host)


def kill_raylet_of(host: Host) -> None:
    kill_program(host, "raylet/raylet")


def kill_gcs(site: Site) -> None:
    assert isinstance(site, SeveralHosts)
    kill_program(site.bed.hosts[0], "gcs_server")


def kill_program(host: Host, program: str) -> None:
    (victim,) = [each for each in map(psutil.Process, host.pids()) if program in " ".join(each.cmdline()[:1])]
    victim.kill()


def on_rank_1(fault: Fault) -> Callable[[Site], None]:
    """Where it is now, and never the host that serves."""

    def strike(site: Site) -> None:
        assert isinstance(site, SeveralHosts)
        host = site.host_of(1)
        assert host is not site.serving
        fault(site, host)

    return strike


RANK_1 = frozenset({"rank 1"})
SHORT_FAULTS: dict[str, Fault] = {
    f"link down {SHORT_S:g} s": link_down(SHORT_S),
    f"100 % loss {SHORT_S:g} s": silence(SHORT_S),
    f"{DELAY_MS:g} ms delay for {DELAYED_S:g} s": slow_link,
}
BOTH = (Moment.DECODE, Moment.PREFILL)


def links(directory: Path, choice: Choice) -> Iterator[Row]:
    """Faults that heal by themselves."""
    yield from _struck(directory, choice.of(_short(Moment.DECODE)))


def links_in_prefill(directory: Path, choice: Choice) -> Iterator[Row]:
    yield from _struck(directory, choice.of(_short(Moment.PREFILL)))


def _short(moment: str) -> list[Cell]:
    return [Cell(name, moment, on_rank_1(fault)) for name, fault in SHORT_FAULTS.items()]


def head(directory: Path, choice: Choice) -> Iterator[Row]:
    """Ray's control service, on a host without ranks, for good: a cluster for each cell."""
    for cell in choice.of([Cell("kill -9 GCS", moment, kill_gcs) for moment in BOTH]):
        yield from _struck(directory / cell.moment, [cell])


def lost_raylet(directory: Path, choice: Choice) -> Iterator[Row]:
    """It takes the rank of its host with it, which moves to another host."""
    fault = on_rank_1(kill_raylet)
    cells = [Cell("kill -9 raylet of rank 1", moment, fault, RANK_1) for moment in BOTH]
    yield from _struck(directory, choice.of(cells))


def lost_link(directory: Path, choice: Choice) -> Iterator[Row]:
    """So long that the host is given up."""
    fault = on_rank_1(link_down(LONG_S))
    cells = [Cell(f"link down {LONG_S:g} s", moment, fault, RANK_1) for moment in BOTH]
    yield from _struck(directory, choice.of(cells))


def lost_packets(directory: Path, choice: Choice) -> Iterator[Row]:
    """The same without a word."""
    fault = on_rank_1(silence(LONG_S))
    cells = [Cell(f"100 % loss {LONG_S:g} s", moment, fault, RANK_1) for moment in BOTH]
    yield from _struck(directory, choice.of(cells))


def _struck(directory: Path, cells: list[Cell]) -> Iterator[Row]:
    """A host that was given up joins again: it is the spare place of the next cell."""
    directory.mkdir(exist_ok=True)
    with several_hosts(directory) as site:
        expected, rows = unfaulted(site, moments_of(cells))
        yield from (dataclasses.replace(row, site=NAME) for row in rows)
        settle(site)
        for cell in cells:
            former = site.host_of(1)
            row = run_cell(NAME, site, cell, expected)
            if cell.replaced and not row.wrong:
                row = dataclasses.replace(row, wrong=_wrong_of_move(site, former))
            yield row
            if cell.replaced and cell is not cells[-1]:
                site.hosts.join_again(former)


def _wrong_of_move(site: SeveralHosts, former: Host) -> tuple[str, ...]:
    """What rank 0 holds too, the norms, rank 1 has from it, over the network."""
    wrong = ["rank 1 did not move"] if site.host_of(1) is former else []
    if not site.status()["ranks"][1]["weight_bytes_from_peers"]:
        wrong.append("none of rank 1's weights came from rank 0")
    return tuple(wrong)


def starting_hosts(directory: Path, choice: Choice) -> Iterator[Row]:
    """Faults of rank 1's host while the model loads: the server becomes ready all the same."""
    faults = {**SHORT_FAULTS, "kill -9 raylet of rank 1": kill_raylet}
    with ray_hosts(directory) as hosts:
        for name, fault in choice.of(list(faults.items())):
            yield _started(hosts, name, fault)


def _started(hosts: RayHosts, name: str, fault: Fault) -> Row:
    wrong: list[str] = []
    replaced: tuple[str, ...] = ()
    became = "ready"
    with SeveralHosts(hosts) as site:
        site.wait_for("connecting ranks")
        before = gang_of(site.processes())
        struck_s = time.monotonic()
        fault(site, hosts.bed.hosts[2])
        outcome = Outcome(0, 0, 0, 0, 0.0, ())
        try:
            site.wait_for("ready in")
            outcome = ask_once(site.urls, site.network, time.monotonic() - struck_s)
            replaced = replaced_since(before, settle(site))
            wrong += outcome.notes
        except AssertionError as error:  # NotSettled is one
            became = "not ready"
            wrong.append(str(error))
    return Row(NAME, name, f"loading: {became}", outcome, replaced, tuple(wrong))
