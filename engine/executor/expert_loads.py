"""How many (token, expert) pairs a rank's experts have had, told to the leader now and then."""

from engine.executor.expert_mover import mixture_layers
from engine.messages import ExpertLoads, StepPlan
from engine.models.registry import Model
from engine.parallel.mesh import Mesh

REPORT_STEPS, REPORT_US = 32, 250_000
"""Steps, or microseconds of them, after which a rank reports: it costs a copy from the device and some hundred numbers
for the leader."""


class LoadCounters:
    """Of the ranks that hold the same experts' shares only the first reports.

    ``report`` comes before each plan's changes, ``stepped`` after its step.
    """

    def __init__(self, model: Model, mesh: Mesh) -> None:
        self._rank = mesh.rank
        is_reporting = mesh.config.ep > 1 and mesh.expert_tp_rank == 0
        self._mixtures = list(mixture_layers(model, mesh).values()) if is_reporting else []
        self._told = [mixture.loads.cpu().clone() for mixture in self._mixtures]
        self._num_steps = self._duration_us = 0

    def report(self, plan: StepPlan) -> list[ExpertLoads]:
        """What came since the last report, if it is time for one; always before the experts of this plan change."""
        if not self._mixtures or not self._num_steps:
            return []
        if self._num_steps < REPORT_STEPS and self._duration_us < REPORT_US and not plan.experts:
            return []
        by_layer = []
        for index, mixture in enumerate(self._mixtures):
            now = mixture.loads.cpu()
            by_layer.append((now - self._told[index]).tolist())
            self._told[index] = now.clone()
        report = ExpertLoads(self._rank, by_layer, self._num_steps, self._duration_us)
        self._num_steps = self._duration_us = 0
        return [report]

    def stepped(self, duration_us: int) -> None:
        self._num_steps += 1
        self._duration_us += duration_us
