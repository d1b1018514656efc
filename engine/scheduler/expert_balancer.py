"""Decides which experts move, and when: from what each expert has had to do, one layer after another.

A move is staged (ranks read while steps go on), then used (a plan names the new table) or dropped (a rank could not
read it); docs/step_protocol.md, "Experts". Pure: it is told the time and what came back, and gives what to send.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from engine.messages import (
    DropExperts,
    ExpertChange,
    ExpertLoads,
    ExpertOutcome,
    LayerExperts,
    StageExperts,
    StepPlan,
    StepResult,
    UseExperts,
)
from engine.parallel.expert_balance import (
    ExpertPlacement,
    MoveCost,
    balanced_placement,
    imbalance,
    is_worth_moving,
    linear_placement,
    moves,
)
from engine.scheduler.expert_layout import ExpertLayout
from engine.scheduler.expert_stats import ExpertStats

_log = logging.getLogger(__name__)

_READ_BYTES_PER_S = 200e6
"""Until the first move has told."""
_FIRST_RETRY_S, _LAST_RETRY_S = 60.0, 3600.0
_MOVE_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class BalanceConfig:
    """``interval_s``: between two looks at all layers. ``min_pairs_per_expert``: what a layer must have seen since the
    last, per expert, so that its loads mean something. ``least_gain``: of max ÷ mean; what is less may be chance.
    ``horizon_s``: see MoveCost."""

    interval_s: float = 10.0
    min_pairs_per_expert: int = 32
    least_gain: float = 0.05
    horizon_s: float = 60.0


class _Phase(Enum):
    PLANNED = auto()
    """No plan has said it yet."""
    STAGING = auto()
    READY = auto()
    FAILED = auto()
    USED = auto()
    """The plan that says so is in flight."""


@dataclass(eq=False)
class _Move:
    number: int
    layer: int
    placement: ExpertPlacement
    num_experts: int
    awaited: set[int]
    """Ranks."""
    deadline_s: float = 0.0
    phase: _Phase = _Phase.PLANNED
    bytes_per_s: float = float("inf")
    """Of the slowest rank."""


class _Decayed:
    """Sums over the time since the last look, and half of what they were then."""

    def __init__(self, count: int) -> None:
        self.fresh = [0.0] * count
        self.values = [0.0] * count
        """As of the last look."""

    def look(self) -> None:
        self.values = [old / 2 + new for old, new in zip(self.values, self.fresh, strict=True)]
        self.fresh = [0.0] * len(self.fresh)


@dataclass(eq=False)
class _Layer:
    stage: int
    placement: ExpertPlacement
    """Of the last plan that has returned."""
    experts: _Decayed
    """Pairs of each expert."""
    ranks: _Decayed
    """Pairs of each ep rank."""


class ExpertBalancer:
    """Over all epochs of one engine. Calls come from the engine's thread, between plans."""

    def __init__(
        self, layout: ExpertLayout, clock: Callable[[], float], config: BalanceConfig = BalanceConfig()
    ) -> None:
        self._layout, self._clock, self._config = layout, clock, config
        num_experts, num_ranks = layout.num_experts, layout.num_ep_ranks
        self._linear = linear_placement(num_experts, num_ranks, layout.num_slots)
        self._layers = {
            layer: _Layer(stage, self._linear, _Decayed(num_experts), _Decayed(num_ranks))
            for stage, layers in enumerate(layout.layers)
            for layer in layers
        }
        self.table = 0
        """The number of the table that the next plan is computed with."""
        self._move: _Move | None = None
        self._queue: deque[int] = deque()
        """Layers to be looked at."""
        self._num_begun = 0
        self._num_moves = self._num_failed = self._num_moved = 0
        self._rank_pairs = [0] * num_ranks
        self._expert_pairs: dict[int, tuple[int, ...]] | None = None
        """As ``stats`` shows it; None: something came since."""
        self._bytes_per_s, self._retry_s = _READ_BYTES_PER_S, _FIRST_RETRY_S
        self._seconds = _Decayed(2)
        """In all, and of these in steps."""
        self._looked_s = clock()
        self._look_at_s = self._looked_s + config.interval_s

    @property
    def may_move(self) -> bool:
        """Else it only counts: no plan of any engine will carry a change."""
        return self._layout.moves

    @property
    def is_moving(self) -> bool:
        """Whether ranks read, or have read, what no plan has used yet."""
        return self._move is not None and self._move.phase not in (_Phase.PLANNED, _Phase.USED)

    @property
    def has_changes(self) -> bool:
        """Whether the next plan may have to carry something."""
        return self._move is not None and self._move.phase not in (_Phase.STAGING, _Phase.USED)

    def take_changes(self, *, may_move: bool) -> list[ExpertChange]:
        """For the plan that is being made, where it ``has_changes``. ``may_move``: nothing stands against a move now
        (no adapter is loaded)."""
        move = self._move
        assert move is not None and self.has_changes
        if move.phase is _Phase.PLANNED and may_move:
            move.phase, move.deadline_s = _Phase.STAGING, self._clock() + _MOVE_TIMEOUT_S
            return [StageExperts(move.number, _message(move.layer, move.placement))]
        if move.phase is _Phase.READY and may_move:
            move.phase = _Phase.USED
            self.table += 1
            return [UseExperts(move.number)]
        self._move = None
        if not may_move:
            self._queue.clear()
        return [] if move.phase is _Phase.PLANNED else [DropExperts(move.number)]

    def returned(self, plan: StepPlan, result: StepResult) -> None:
        """``plan`` has returned; ``result`` has all ranks' news of experts.

        May take some milliseconds, in which ranks compute the next plan: one layer is looked at in each call.
        """
        for loads in result.expert_loads:
            self._count(loads)
        if result.expert_loads:
            self._seconds.fresh[1] += max(loads.duration_us for loads in result.expert_loads) / 1e6
        move = self._move
        if move is not None and move.phase is _Phase.USED and UseExperts(move.number) in plan.experts:
            self._finish(move)
        elif move is not None and move.phase is _Phase.STAGING:
            self._wait_for(move, result.expert_outcomes)
        if self._clock() >= self._look_at_s and self._move is None:
            self._look()
        if self._queue and self._move is None:
            self._move = self._next_move()

    def restart(self) -> None:
        """A new epoch begins with ``placements``; a move that was not done is forgotten."""
        self.table = 0
        self._move = None
        self._queue.clear()

    def set_layout(self, layout: ExpertLayout) -> None:
        """Between two epochs: the same gang, some of its ranks on other hosts."""
        self._layout = layout

    def placements(self) -> list[LayerExperts]:
        """Where the experts were in the last plan that returned, of layers where that is not the linear placement."""
        return [
            _message(number, layer.placement)
            for number, layer in self._layers.items()
            if layer.placement != self._linear
        ]

    def stats(self) -> ExpertStats:
        lately = [[old + new for old, new in _pairs(layer.ranks)] for layer in self._layers.values()]
        most, mean = sum(map(max, lately)), sum(map(sum, lately)) / self._layout.num_ep_ranks
        if self._expert_pairs is None:
            # Some thousand numbers: made when ranks have told something, not after each step.
            self._expert_pairs = {
                number: tuple(round(old + new) for old, new in _pairs(layer.experts))
                for number, layer in self._layers.items()
            }
        return ExpertStats(
            imbalance=most / mean if mean else 1.0,
            rank_pairs=tuple(self._rank_pairs),
            num_moves=self._num_moves,
            num_failed_moves=self._num_failed,
            num_moved_experts=self._num_moved,
            layers=self._expert_pairs,
        )

    def _count(self, loads: ExpertLoads) -> None:
        self._expert_pairs = None
        stage, index = divmod(loads.rank, self._layout.ranks_per_stage)
        ep_rank = index // self._layout.expert_tp
        for number, counts in zip(self._layout.layers[stage], loads.by_layer, strict=True):
            layer = self._layers[number]
            for expert, count in zip(layer.placement.slots[ep_rank], counts, strict=True):
                layer.experts.fresh[expert] += count
            layer.ranks.fresh[ep_rank] += sum(counts)
            self._rank_pairs[ep_rank] += sum(counts)

    def _look(self) -> None:
        """Layers that have much to do and are badly balanced come first."""
        now = self._clock()
        least = self._config.min_pairs_per_expert * self._layout.num_experts
        if min(sum(layer.experts.fresh) for layer in self._layers.values()) < least:
            self._look_at_s = now + self._config.interval_s / 4
            return
        self._seconds.fresh[0] = now - self._looked_s
        self._looked_s, self._look_at_s = now, max(now + self._config.interval_s, self._look_at_s)
        for layer in self._layers.values():
            layer.experts.look()
            layer.ranks.look()
        self._seconds.look()
        self._expert_pairs = None
        if self._layout.moves:
            self._queue.extend(sorted(self._layers, key=lambda number: -max(self._layers[number].ranks.values)))

    def _next_move(self) -> _Move | None:
        """For the next layer, if it is worth it."""
        number = self._queue.popleft()
        layer = self._layers[number]
        loads = layer.experts.values
        ranks_per_host = self._layout.ranks_per_host[layer.stage]
        placement = balanced_placement(loads, ranks_per_host, self._layout.num_slots, layer.placement)
        elapsed_s, _ = self._seconds.values
        per_s = [load / elapsed_s for load in loads]
        gain = imbalance(layer.placement, loads) - imbalance(placement, loads)
        if gain < self._config.least_gain or not is_worth_moving(layer.placement, placement, per_s, self._cost()):
            return None
        first = layer.stage * self._layout.ranks_per_stage
        self._num_begun += 1
        return _Move(
            number=self._num_begun,
            layer=number,
            placement=placement,
            num_experts=len(moves(layer.placement, placement)),
            awaited=set(range(first, first + self._layout.ranks_per_stage)),
        )

    def _cost(self) -> MoveCost:
        """A pair takes the experts' share of the steps' time, divided by what the most loaded ranks had to do."""
        most = sum(max(layer.ranks.values) for layer in self._layers.values())
        _, busy_s = self._seconds.values
        seconds_per_pair = busy_s * self._layout.expert_share / most if most else 0.0
        return MoveCost(self._layout.expert_bytes, self._bytes_per_s, seconds_per_pair, self._config.horizon_s)

    def _wait_for(self, move: _Move, outcomes: Sequence[ExpertOutcome]) -> None:
        for outcome in outcomes:
            self._take_outcome(move, outcome)
        if move.phase is _Phase.STAGING and self._clock() > move.deadline_s:
            self._fail(move, f"rank {min(move.awaited)} has not read it within {_MOVE_TIMEOUT_S:g} s")

    def _take_outcome(self, move: _Move, outcome: ExpertOutcome) -> None:
        if outcome.move != move.number:
            return  # of one that was dropped
        if outcome.error:
            self._fail(move, f"rank {outcome.rank}: {outcome.error}")
            return
        move.awaited.discard(outcome.rank)
        if outcome.seconds > 0 and outcome.num_bytes:
            move.bytes_per_s = min(move.bytes_per_s, outcome.num_bytes / outcome.seconds)
        if not move.awaited and move.phase is _Phase.STAGING:
            move.phase = _Phase.READY

    def _fail(self, move: _Move, reason: str) -> None:
        """Everything stays as it is, and for a while nothing is tried again."""
        _log.error("the experts of layer %d stay where they are: %s", move.layer, reason)
        move.phase = _Phase.FAILED
        self._num_failed += 1
        self._queue.clear()
        self._look_at_s = self._clock() + self._retry_s
        self._retry_s = min(2 * self._retry_s, _LAST_RETRY_S)

    def _finish(self, move: _Move) -> None:
        layer = self._layers[move.layer]
        layer.placement = move.placement
        layer.ranks.fresh = [0.0] * self._layout.num_ep_ranks
        layer.ranks.values = move.placement.rank_loads(layer.experts.values)
        self._num_moves += 1
        self._num_moved += move.num_experts
        self._retry_s = _FIRST_RETRY_S
        if move.bytes_per_s < float("inf"):
            self._bytes_per_s = move.bytes_per_s
        self._move = None


def _message(layer: int, placement: ExpertPlacement) -> LayerExperts:
    return LayerExperts(layer, [list(experts) for experts in placement.slots])


def _pairs(sums: _Decayed) -> list[tuple[float, float]]:
    return list(zip(sums.values, sums.fresh, strict=True))
