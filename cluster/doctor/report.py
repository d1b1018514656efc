"""An examination as one JSON object, and as tables for people: hosts, links, then what is suspicious."""

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from cluster.doctor.check_network import chosen_environment
from cluster.doctor.examine import Examination
from cluster.doctor.facts import LinkFacts
from cluster.doctor.finding import Finding, Level, of_level

WIDTH = 100
_COLUMNS = 4
_MARKS = {Level.OK: "", Level.WARN: "WARN ", Level.FAIL: "FAIL "}


def as_object(found: Examination) -> dict[str, Any]:
    """Seconds, bytes and bytes per second, as the names say."""
    return {
        "ok": found.is_well,
        "findings": [finding.as_object() for finding in found.findings],
        "hosts": [{**msgspec.to_builtins(host), "chosen": chosen_environment(host)} for host in found.hosts],
        "ranks": [
            {
                **msgspec.structs.asdict(rank),
                "links": None,
                "host": found.rank_hosts[rank.rank],
                "replica": rank.rank // found.gang_size,
            }
            for rank in found.ranks
        ],
        "links": [msgspec.to_builtins(link) for link in found.links],
    }


def print_examination(found: Examination, console: Console) -> None:
    for first in range(0, len(found.hosts), _COLUMNS):
        console.print(_hosts(found, [host.address for host in found.hosts[first : first + _COLUMNS]]))
    if len(found.rank_hosts) > found.gang_size:
        console.print(f"each replica has {found.gang_size} ranks: those of the first are numbered from 0, and so on")
    if found.links:
        for first in range(0, len(found.rank_hosts), _COLUMNS):
            console.print(_links(found, range(first, min(first + _COLUMNS, len(found.rank_hosts)))))
    for host in found.hosts:
        chosen = " ".join(f"{name}={value}" for name, value in chosen_environment(host).items())
        console.print(f"{host.address}: {chosen}")
    for line in _verdict(found.findings):
        console.print(line)


def _hosts(found: Examination, addresses: Sequence[str]) -> Table:
    """A row for each check, a column for each host."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for address in addresses:
        table.add_column(address)
    cells = {(finding.check, finding.where): finding for finding in found.findings}
    for check in dict.fromkeys(finding.check for finding in found.findings if finding.where in addresses):
        row = [cells.get((check, address)) for address in addresses]
        table.add_row(check, *("-" if finding is None else _MARKS[finding.level] + finding.value for finding in row))
    return table


def _links(found: Examination, columns: range) -> Table:
    """Latency and bandwidth of each pair of ranks: between hosts of the step channel's TCP, inside of an all-reduce."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("links")
    for rank in columns:
        table.add_column(f"rank {rank}\n{found.rank_hosts[rank]}")
    told = {(link.first, link.second): link for link in found.links}
    for rank, host in enumerate(found.rank_hosts):
        pairs = [told.get((min(rank, other), max(rank, other))) for other in columns]
        if any(pair is not None for pair in pairs):
            table.add_row(f"rank {rank} {host}", *map(_link, pairs))
    return table


def _link(link: LinkFacts | None) -> str:
    if link is None:
        return "-"
    latency_s, rate = link.channel_s, link.channel_bytes_per_s
    if latency_s is None or rate is None:
        latency_s, rate = link.collective_s, link.collective_bytes_per_s
    told = "" if latency_s is None or rate is None else f"{latency_s * 1e3:.2f} ms, {rate * 8 / 1e6:,.0f} Mbit/s"
    if link.error is not None:
        return f"FAIL {told or 'not reached'}"
    return told


def _verdict(findings: Sequence[Finding]) -> Iterator[str]:
    failures, warnings = of_level(findings, Level.FAIL), of_level(findings, Level.WARN)
    for level, found in (("FAIL", failures), ("WARN", warnings)):
        for finding in found:
            yield f"{level} {finding.sentence()}"
    if failures:
        yield f"{len(failures)} of {len(findings)} checks failed: serving would not work until they are mended"
    elif warnings:
        yield f"{len(findings)} checks, {len(warnings)} warnings: it will work, and could be better"
    else:
        yield f"{len(findings)} checks, all well"
