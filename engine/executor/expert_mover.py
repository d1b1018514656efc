"""A rank's half of moving experts between steps: reads what it will need while steps go on, and puts it in place when a
plan says so (docs/step_protocol.md, "Experts")."""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Sequence

import torch

from engine.errors import ProtocolViolation
from engine.layers.experts import StagedExpert
from engine.layers.moe import MixtureOfExperts
from engine.messages import DropExperts, ExpertOutcome, LayerExperts, StageExperts, StepPlan, UseExperts
from engine.models.registry import Model
from engine.parallel.expert_balance import ExpertPlacement, linear_placement
from engine.parallel.mesh import Mesh
from engine.weights.expert_reader import ExpertReader, MoveCancelled

_log = logging.getLogger(__name__)

_NICENESS = 10
"""Of the thread that reads: steps come first."""


def mixture_layers(model: Model, mesh: Mesh) -> dict[int, MixtureOfExperts]:
    """This rank's mixture layers, by their number in the model."""
    assert isinstance(model, torch.nn.Module)
    numbers = [layer for layer in mesh.layers(model.config) if model.config.layers[layer].moe is not None]
    mixtures = [module for module in model.modules() if isinstance(module, MixtureOfExperts)]
    return dict(zip(numbers, mixtures, strict=True))


class ExpertMover:
    """Lives as long as the rank's weights; ``begin_epoch`` comes first in each epoch."""

    def __init__(self, model: Model, mesh: Mesh, reader: ExpertReader, device: torch.device) -> None:
        self._mixtures = mixture_layers(model, mesh)
        self._parallel, self._rank, self._ep_rank = mesh.config, mesh.rank, mesh.ep_rank
        self._reader = reader
        self._device = device
        self._moves: dict[int, _Move] = {}
        self._table = 0

    @torch.inference_mode()
    def begin_epoch(self, placements: Sequence[LayerExperts]) -> None:
        """Has each slot hold what the new epoch's tables say, whatever an earlier one left behind.

        Raises CheckpointError where an expert cannot be read.
        """
        self.close()
        self._table = 0
        wanted = {each.layer: placement_of(each) for each in placements}
        for layer, mixture in self._mixtures.items():
            held = mixture.experts.held
            linear = linear_placement(mixture.router.num_experts, self._parallel.ep, len(held))
            placement = wanted.get(layer, linear)
            for slot, expert in enumerate(placement.slots[self._ep_rank]):
                if held[slot] != expert:
                    staged = mixture.experts.staged(expert)
                    self._reader.fill(staged)
                    self._put(mixture, {slot: staged})
            mixture.table.set(placement)

    def apply(self, plan: StepPlan) -> None:
        """What a plan changes, before its step. Raises ProtocolViolation for what may not come now."""
        for change in plan.experts:
            if isinstance(change, StageExperts):
                self._stage(change)
            elif isinstance(change, UseExperts):
                self._use(change)
            else:
                self._drop(change)
        if plan.expert_table != self._table:
            raise ProtocolViolation(
                f"step {plan.step} is to be computed with expert table {plan.expert_table}; rank {self._rank} has "
                f"{self._table}"
            )

    def take_outcomes(self) -> list[ExpertOutcome]:
        """Of the moves that have been read, or failed, since the last call."""
        return [outcome for move in self._moves.values() if (outcome := move.take_outcome()) is not None]

    def close(self) -> None:
        """Frees everything that is staged; what is still being read is given up."""
        for move in self._moves.values():
            move.cancel()
        self._moves.clear()

    def _stage(self, change: StageExperts) -> None:
        if change.move in self._moves:
            raise ProtocolViolation(f"the move {change.move} of experts was begun already")
        mixture = self._mixtures.get(change.placement.layer)
        if mixture is not None:  # else another stage's
            self._moves[change.move] = _Move(change, mixture, self._reader, self._rank, self._ep_rank, self._device)

    def _use(self, change: UseExperts) -> None:
        self._table += 1
        move = self._moves.pop(change.move, None)
        if move is None:
            return  # another stage's
        if not move.is_complete:
            raise ProtocolViolation(f"the move {change.move} of experts is not there on rank {self._rank}")
        self._put(move.mixture, move.staged)
        move.mixture.table.set(move.placement)

    def _drop(self, change: DropExperts) -> None:
        if (move := self._moves.pop(change.move, None)) is not None:
            move.cancel()

    def _put(self, mixture: MixtureOfExperts, staged: dict[int, StagedExpert]) -> None:
        for slot, expert in staged.items():
            mixture.experts.put(slot, expert)
        if self._device.type == "cuda":
            # The staged memory belongs to another thread's stream, which may use it again as soon as it is freed.
            torch.cuda.current_stream(self._device).synchronize()


class _Move:
    """One layer's new experts on this rank, read by a thread of its own."""

    def __init__(
        self,
        change: StageExperts,
        mixture: MixtureOfExperts,
        reader: ExpertReader,
        rank: int,
        ep_rank: int,
        device: torch.device,
    ) -> None:
        self.number = change.move
        self.mixture = mixture
        self.placement = placement_of(change.placement)
        self.staged: dict[int, StagedExpert] = {}
        self.is_complete = False
        self._reader, self._rank, self._device = reader, rank, device
        held = mixture.experts.held
        self._missing = {s: e for s, e in enumerate(self.placement.slots[ep_rank]) if held[s] != e}
        self._cancelled = threading.Event()
        self._ended = threading.Event()
        self._outcome: ExpertOutcome | None = None
        threading.Thread(target=self._run, name="expert-reader", daemon=True).start()

    def cancel(self) -> None:
        self._cancelled.set()

    def take_outcome(self) -> ExpertOutcome | None:
        """Once, when there is one."""
        if not self._ended.is_set():
            return None
        outcome, self._outcome = self._outcome, None
        return outcome

    def _run(self) -> None:
        # Never up: that is a privilege, and under a Ray that somebody else started the process may be nicer already.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), max(_NICENESS, os.getpriority(os.PRIO_PROCESS, 0)))
        began = time.perf_counter()
        stream = torch.cuda.stream(torch.cuda.Stream(self._device)) if self._device.type == "cuda" else None
        try:
            with torch.inference_mode(), stream or contextlib.nullcontext():
                num_bytes = self._read()
            seconds = time.perf_counter() - began
            self._outcome = ExpertOutcome(self._rank, self.number, num_bytes, seconds)
            self.is_complete = True
        except MoveCancelled:
            self.staged.clear()
        except Exception as error:  # noqa: BLE001  (whatever it is, the old table stays, and the leader is told)
            self.staged.clear()
            _log.warning("experts of move %d could not be read", self.number, exc_info=error)
            self._outcome = ExpertOutcome(self._rank, self.number, error=f"{type(error).__name__}: {error}")
        finally:
            self._ended.set()

    def _read(self) -> int:
        if self._device.type == "cpu":
            torch.set_num_threads(1)  # a new thread begins with as many as there are cores
        for slot, expert in self._missing.items():
            staged = self.mixture.experts.staged(expert)
            if not self.mixture.experts.can_put(slot, staged):
                raise ValueError(f"expert {expert} is stored in another format than the one in its slot")
            self._reader.fill(staged, self._cancelled.is_set)
            self.staged[slot] = staged
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return sum(staged.num_bytes for staged in self.staged.values())


def placement_of(experts: LayerExperts) -> ExpertPlacement:
    return ExpertPlacement(tuple(map(tuple, experts.slots)))
