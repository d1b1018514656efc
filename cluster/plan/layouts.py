"""Which layouts a model can have on given machines, the best first. Pure."""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from cluster.plan.devices import Machines
from engine.config import Determinism, ParallelConfig
from engine.deterministic import deterministic_layout
from engine.errors import LayoutError
from engine.model_config import ModelConfig, validate_layout

_MAX_HOSTS = 64


@dataclass(frozen=True)
class Degrees:
    """What the user fixed; None: free."""

    tp: int | None = None
    pp: int | None = None
    dp: int | None = None
    ep: int | None = None
    num_redundant_experts: int = 0
    balances_experts: bool = False
    determinism: Determinism = Determinism.OFF


def candidates(model: ModelConfig, machines: Machines, fixed: Degrees) -> Iterator[ParallelConfig]:
    """The legal layouts: those that use more devices first, then those whose tensor-parallel groups stay within a host,
    then more tensor and fewer pipeline parallelism, then more expert parallelism. Where dp is free, there is one
    attention replica; for others see ``exchanging``.

    A rank has a device of its own. A tensor-parallel group lies within one host, or fills several.
    """
    found = [
        (_order(layout, machines), layout)
        for layout in _degrees(model, machines, fixed)
        if _is_placeable(layout, machines) and refusal(model, layout) is None
    ]
    for _, layout in sorted(found, key=lambda item: item[0]):
        yield deterministic_layout(model, layout, layout.determinism)


def exchanging(
    model: ModelConfig, machines: Machines, fixed: Degrees, *, over_hosts: bool = True
) -> Iterator[ParallelConfig]:
    """Where dp is free and the model a mixture: the legal layouts with attention replicas, which exchange tokens with
    their experts. For each tp and pp the most replicas that can be, and as much expert parallelism. Those that use more
    devices come first, then those with fewer stages, then with more tensor parallelism. ``over_hosts``: tokens may be
    exchanged between hosts.
    """
    if not model.num_experts or fixed.dp is not None:
        return
    num_devices = machines.num_devices
    widths = (tp for tp in range(1, machines.per_host + 1) if model.num_heads % tp == 0)
    found = []
    for tp in [fixed.tp] if fixed.tp else widths:
        for pp in [fixed.pp] if fixed.pp else range(1, min(model.num_layers, num_devices // tp) + 1):
            most = num_devices // (tp * pp)
            # With half as many more than half of the devices would be idle.
            for dp in range(most, max(1, most // 2), -1):
                layouts = (
                    layout
                    for layout in _expert_degrees(model, tp, pp, dp, fixed)
                    if _is_placeable(layout, machines)
                    and refusal(model, layout) is None
                    and (over_hosts or not ranks_beside(layout, machines))
                )
                if (layout := next(layouts, None)) is not None:
                    found.append(layout)
                    break
    for layout in sorted(found, key=lambda layout: (-layout.num_ranks, layout.pp, -layout.tp)):
        yield deterministic_layout(model, layout, layout.determinism)


def refusal(model: ModelConfig, layout: ParallelConfig) -> str | None:
    """Why the model cannot be divided so; None where it can. Raises InvalidOption where no layout helps: the layout's
    determinism does not allow the model's format."""
    try:
        validate_layout(model, layout)
        deterministic_layout(model, layout, layout.determinism)
    except LayoutError as error:
        return str(error)
    return None


def larger(machines: Machines) -> Iterator[Machines]:
    """More and more machines of the same kind: up to eight devices on the host, then more hosts."""
    per_host = machines.per_host
    while machines.num_hosts == 1 and per_host * 2 <= 8:
        per_host *= 2
        yield machines.resized(1, per_host)
    for num_hosts in range(machines.num_hosts + 1, _MAX_HOSTS + 1):
        yield machines.resized(num_hosts, per_host)


def host_of(rank: int, layout: ParallelConfig, machines: Machines) -> int:
    """Ranks fill hosts in order; a tensor-parallel group that a host cannot take whole any more begins on the next."""
    if layout.tp > machines.per_host:
        return rank // machines.per_host
    groups_per_host = machines.per_host // layout.tp
    return rank // layout.tp // groups_per_host


def ranks_beside(layout: ParallelConfig, machines: Machines) -> int:
    """Of a stage that is on several hosts: most of its ranks on one host; 0 where each stage is on one."""
    stage_size = layout.dp * layout.tp
    counts = (
        Counter(host_of(rank, layout, machines) for rank in range(first, first + stage_size))
        for first in range(0, layout.num_ranks, stage_size)
    )
    return max((max(count.values()) for count in counts if len(count) > 1), default=0)


def num_crossings(layout: ParallelConfig, machines: Machines) -> int:
    """How often a micro-batch goes from one host to another between its stages."""
    firsts = [host_of(rank, layout, machines) for rank in range(0, layout.num_ranks, layout.dp * layout.tp)]
    return sum(one != other for one, other in itertools.pairwise(firsts))


def _degrees(model: ModelConfig, machines: Machines, fixed: Degrees) -> Iterator[ParallelConfig]:
    num_devices, dp = machines.num_devices, fixed.dp or 1
    for tp in [fixed.tp] if fixed.tp else range(1, num_devices // dp + 1):
        for pp in [fixed.pp] if fixed.pp else range(1, num_devices // (dp * tp) + 1):
            if dp * tp * pp > num_devices:
                continue
            yield from _expert_degrees(model, tp, pp, dp, fixed)


def _expert_degrees(model: ModelConfig, tp: int, pp: int, dp: int, fixed: Degrees) -> Iterator[ParallelConfig]:
    """The most expert parallelism first."""
    for ep in [fixed.ep] if fixed.ep else range(dp * tp, 0, -1) if model.num_experts else [1]:
        if (dp * tp) % ep == 0 and _can_balance(ep, fixed):
            yield ParallelConfig(
                tp=tp,
                pp=pp,
                dp=dp,
                ep=ep,
                determinism=fixed.determinism,
                num_redundant_experts=fixed.num_redundant_experts,
                balances_experts=fixed.balances_experts,
            )


def _can_balance(ep: int, fixed: Degrees) -> bool:
    return not fixed.balances_experts or (ep > 1 and fixed.num_redundant_experts % ep == 0)


def _is_placeable(layout: ParallelConfig, machines: Machines) -> bool:
    if layout.tp > machines.per_host:
        return layout.tp % machines.per_host == 0
    return host_of(layout.num_ranks - 1, layout, machines) < machines.num_hosts


def _order(layout: ParallelConfig, machines: Machines) -> tuple[int, bool, int, int, int]:
    return -layout.num_ranks, layout.tp > machines.per_host, -layout.tp, layout.pp, -layout.ep
