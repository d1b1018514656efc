"""Checks of the links between ranks, and what a gang's groups and stages would pay for the slowest of theirs. Pure."""

import statistics
from collections.abc import Iterator, Sequence

from cluster.doctor.facts import LinkFacts
from cluster.doctor.finding import Finding, Level, least, most
from cluster.plan.link_cost import Link, StepTraffic, pipeline_loss, predicted_loss

LATENCY_WARN_S, LATENCY_FAIL_S = 2e-3, 50e-3
RATE_WARN_BYTES_PER_S, RATE_FAIL_BYTES_PER_S = 1e9 / 8, 100e6 / 8
LOST_WARN, LOST_FAIL = 0.001, 0.01
ODD_FACTOR = 4.0
"""A link so much worse than the median of its kind is suspicious, however good it is."""
ODD_LATENCY_S = 0.5e-3
TENSOR_PARALLEL_LOSS = 0.2


def place(facts: LinkFacts, hosts: Sequence[str]) -> str:
    """``rank 0 → rank 2 (10.0.0.1 → 10.0.0.2)``."""
    return f"rank {facts.first} → rank {facts.second} ({hosts[facts.first]} → {hosts[facts.second]})"


def check_links(links: Sequence[LinkFacts], hosts: Sequence[str]) -> Iterator[Finding]:
    """Each pair of ranks: reached, latency, bandwidth, loss. ``hosts``: each rank's address."""
    between = [link for link in links if link.channel_s is not None]
    usual_s = statistics.median([link.channel_s for link in between if link.channel_s is not None] or [0.0])
    rates = [link.channel_bytes_per_s for link in between if link.channel_bytes_per_s is not None]
    usual_rate = statistics.median(rates or [0.0])
    for link in links:
        where = place(link, hosts)
        if link.error is not None:
            yield Finding("link", where, Level.FAIL, link.error, "", _unreached(hosts[link.second]))
        if link.channel_s is not None:
            yield _latency(where, link.channel_s, usual_s)
        if link.channel_bytes_per_s is not None:
            yield _bandwidth(where, link.channel_bytes_per_s, usual_rate)
        if link.lost_share is not None:
            level = most(link.lost_share, LOST_WARN, LOST_FAIL)
            remedy = "" if level is Level.OK else "look for a bad cable, port or duplex setting: ethtool -S"
            yield Finding("loss", where, level, f"{link.lost_share:.2%}", f"at most {LOST_WARN:.1%}", remedy)
        if link.collective_s is not None and link.collective_bytes_per_s is not None:
            told = f"{_time(link.collective_s)} for 8 KiB, {_rate(link.collective_bytes_per_s)}"
            yield Finding(f"all-reduce over {link.transport}", where, Level.OK, told)


def _unreached(host: str) -> str:
    return f"let the firewall pass every TCP port between the hosts, and see that {host} is up"


def _latency(where: str, seconds: float, usual_s: float) -> Finding:
    level = most(seconds, LATENCY_WARN_S, LATENCY_FAIL_S)
    limit = f"at most {_time(LATENCY_WARN_S)}"
    if level is Level.OK and seconds > ODD_FACTOR * usual_s and seconds > ODD_LATENCY_S:
        level, limit = Level.WARN, f"the others take {_time(usual_s)}"
    remedy = "" if level is Level.OK else "put both hosts on one switch; keep tensor parallelism inside a host"
    return Finding("latency", where, level, _time(seconds), limit, remedy)


def _bandwidth(where: str, rate: float, usual_rate: float) -> Finding:
    level = least(rate, RATE_WARN_BYTES_PER_S, RATE_FAIL_BYTES_PER_S)
    limit = f"at least {_rate(RATE_WARN_BYTES_PER_S)}"
    if level is Level.OK and rate * ODD_FACTOR < usual_rate:
        level, limit = Level.WARN, f"the others carry {_rate(usual_rate)}"
    remedy = "" if level is Level.OK else "see which interface it takes (above) and its speed: ethtool"
    return Finding("bandwidth", where, level, _rate(rate), limit, remedy)


def check_tensor_parallel_link(
    groups: Sequence[Sequence[int]],
    links: Sequence[LinkFacts],
    hosts: Sequence[str],
    traffic: StepTraffic,
    step_s: float,
) -> Iterator[Finding]:
    """What each tensor-parallel group that crosses hosts would lose to its slowest link.

    Args:
        groups: the ranks of each.
        traffic: of a decode step (cluster.plan.link_cost).
        step_s: of the same step without a link: a rank's weights, read once.
    """
    remedy = "keep tensor parallelism inside a host, and use --pp across hosts"
    for group in groups:
        yield from _group(("tensor parallelism over", "collectives", remedy), group, links, hosts, traffic, step_s)


def check_exchange_link(
    groups: Sequence[Sequence[int]],
    links: Sequence[LinkFacts],
    hosts: Sequence[str],
    traffic: StepTraffic,
    step_s: float,
) -> Iterator[Finding]:
    """The same for stages whose ranks exchange tokens; ``groups``: the ranks of each stage."""
    remedy = "keep the ranks that exchange tokens on one host: lower --dp, or use --replicas"
    for group in groups:
        yield from _group(("exchange of tokens over", "exchanges", remedy), group, links, hosts, traffic, step_s)


def check_pipeline_links(
    gang: range,
    stage_size: int,
    num_in_flight: int,
    links: Sequence[LinkFacts],
    hosts: Sequence[str],
    row_bytes: int,
    stage_s: float,
) -> Iterator[Finding]:
    """What a pipeline would lose to the links between its stages, of which the slowest is named.

    Args:
        gang: its ranks, stage after stage.
        stage_size: ranks of a stage.
        num_in_flight: micro-batches.
        row_bytes: of one micro-batch, from a rank to its neighbour.
        stage_s: of a stage without links: a rank's weights, read once.
    """
    by_boundary: dict[int, tuple[float, LinkFacts]] = {}
    for link in links:
        if link.first not in gang or link.second - link.first != stage_size:
            continue
        if link.channel_s is None or link.channel_bytes_per_s is None:
            continue
        # Half of a round trip.
        one_way_s = StepTraffic(1, row_bytes).seconds(Link(link.channel_s / 2, link.channel_bytes_per_s))
        boundary = (link.first - gang.start) // stage_size
        by_boundary[boundary] = max(by_boundary.get(boundary, (0.0, link)), (one_way_s, link), key=lambda item: item[0])
    if not by_boundary:
        return
    slowest_s, slowest = max(by_boundary.values(), key=lambda item: item[0])
    # What was sampled goes back to the leader, over one more of them.
    link_s = sum(one_way_s for one_way_s, _ in by_boundary.values()) + slowest_s
    loss = pipeline_loss(stage_s, len(gang) // stage_size, num_in_flight, link_s)
    level = most(loss, TENSOR_PARALLEL_LOSS, 1.0)
    value = (
        f"{loss:.0%} of the throughput of {num_in_flight} micro-batches would be lost: a token takes {_time(link_s)} "
        f"more beside {_time(stage_s)} in each stage"
    )
    remedy = "" if level is Level.OK else "put neighbouring stages on nearer hosts, or use fewer hosts"
    yield Finding("pipeline over", place(slowest, hosts), level, value, f"at most {TENSOR_PARALLEL_LOSS:.0%}", remedy)


def _group(
    words: tuple[str, str, str],
    group: Sequence[int],
    links: Sequence[LinkFacts],
    hosts: Sequence[str],
    traffic: StepTraffic,
    step_s: float,
) -> Iterator[Finding]:
    """``words``: what the group is for, what it waits for, and what to do where that is too slow."""
    crossing = [
        (traffic.seconds(Link(link.collective_s, link.channel_bytes_per_s)), link)
        for link in links
        if link.first in group and link.second in group and hosts[link.first] != hosts[link.second]
        and link.collective_s is not None and link.channel_bytes_per_s is not None
    ]  # fmt: skip
    if not crossing:
        return
    name, waits, remedy = words
    link_s, slowest = max(crossing, key=lambda item: item[0])
    loss = predicted_loss(step_s, link_s)
    level = most(loss, TENSOR_PARALLEL_LOSS, 1.0)
    value = (
        f"{loss:.0%} of a decode step would be lost: {traffic.num_collectives} {waits} of "
        f"{_time(slowest.collective_s or 0.0)} and {traffic.num_bytes / 1e3:,.0f} kB take {_time(link_s)}, "
        f"the rest {_time(step_s)}"
    )
    limit = f"at most {TENSOR_PARALLEL_LOSS:.0%}"
    yield Finding(name, place(slowest, hosts), level, value, limit, "" if level is Level.OK else remedy)


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:,.0f} µs"


def _rate(bytes_per_s: float) -> str:
    bits = bytes_per_s * 8
    return f"{bits / 1e9:,.1f} Gbit/s" if bits >= 1e9 else f"{bits / 1e6:,.0f} Mbit/s"
