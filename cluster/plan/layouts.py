"""Which layouts a model can have on given machines, the best first. Pure."""

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
    """What the user fixed; None: free. Attention replicas (dp) are never chosen, only obeyed."""

    tp: int | None = None
    pp: int | None = None
    dp: int | None = None
    ep: int | None = None
    num_redundant_experts: int = 0
    balances_experts: bool = False
    determinism: Determinism = Determinism.OFF


def candidates(model: ModelConfig, machines: Machines, fixed: Degrees) -> Iterator[ParallelConfig]:
    """The legal layouts: those that use more devices first, then those whose tensor-parallel groups stay within a host,
    then more tensor and fewer pipeline parallelism, then more expert parallelism.

    A rank has a device of its own. A tensor-parallel group lies within one host, or fills several.
    """
    found = [
        (_order(layout, machines), layout)
        for layout in _degrees(model, machines, fixed)
        if _is_placeable(layout, machines) and refusal(model, layout) is None
    ]
    for _, layout in sorted(found, key=lambda item: item[0]):
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


def _degrees(model: ModelConfig, machines: Machines, fixed: Degrees) -> Iterator[ParallelConfig]:
    num_devices, dp = machines.num_devices, fixed.dp or 1
    for tp in [fixed.tp] if fixed.tp else range(1, num_devices // dp + 1):
        for pp in [fixed.pp] if fixed.pp else range(1, num_devices // (dp * tp) + 1):
            if dp * tp * pp > num_devices:
                continue
            eps = [fixed.ep] if fixed.ep else range(1, dp * tp + 1) if model.num_experts else [1]
            for ep in eps:
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
