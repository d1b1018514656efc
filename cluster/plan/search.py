"""The layout that a model gets on given machines, and the nearest on which it fits."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

from cluster.plan.devices import Machines
from cluster.plan.layout_plan import LayoutPlan, plan_layout
from cluster.plan.layouts import Degrees, candidates, larger, refusal
from cluster.plan.rank_memory import PlanOptions, budget_of, weights_by_rank
from engine.config import Determinism, ParallelConfig
from engine.errors import LayoutError
from engine.models.shapes.model_shapes import ModelShapes
from engine.quantization_config import WeightFormat
from engine.weights.ledger import count_parameters

_MAX_TRIED = 8
"""Layouts that are built on the same machines. They differ in what is held twice, which is little."""
_USEFUL_MODEL_LEN = 4096
"""Tokens of a request that the nearest layout must take, unless the model or the user wants fewer."""
_HALF_A_BYTE = (
    WeightFormat.INT4,
    WeightFormat.AWQ,
    WeightFormat.GPTQ,
    WeightFormat.NF4,
    WeightFormat.GGUF,
    WeightFormat.ONLINE_INT4,
)


class LayoutSearch:
    """For one model and set of options; shapes of a layout are built once."""

    def __init__(self, shapes: ModelShapes, options: PlanOptions) -> None:
        self._shapes = shapes
        self._options = options
        self.counts = count_parameters(shapes)
        self._weights: dict[ParallelConfig, Sequence[Mapping[str, int]] | LayoutError] = {}

    def choose(self, machines: Machines, fixed: Degrees) -> LayoutPlan:
        """The best legal layout that fits; where none does, the best.

        Raises LayoutError where the degrees that the user fixed are impossible, and InvalidOption where deterministic
        mode serves no such model.
        """
        first: LayoutPlan | None = None
        hopeless = self._is_hopeless(machines)
        for plan in self._plans(machines, fixed):
            if plan.fits or hopeless:
                return plan
            first = first or plan
        if first is not None:
            return first
        refused = [error for error in self._weights.values() if isinstance(error, LayoutError)]
        raise refused[0] if refused else LayoutError(self._impossible(machines, fixed))

    def nearest(self, machines: Machines, determinism: Determinism = Determinism.OFF) -> LayoutPlan | None:
        """The first that fits, with requests of a useful length, on these machines or the fewest more of their kind;
        None where none was found."""
        wanted = self._options.max_model_len or self._shapes.config.max_context_len
        for grown in (machines, *larger(machines)):
            if self._is_hopeless(grown):
                continue
            for plan in self._plans(grown, Degrees(determinism=determinism)):
                if plan.max_model_len >= min(wanted, _USEFUL_MODEL_LEN):
                    return plan
        return None

    def _plans(self, machines: Machines, fixed: Degrees) -> Iterator[LayoutPlan]:
        config = self._shapes.config
        found = candidates(config, machines, fixed)
        layouts = (layout for layout in found if self._weights_of(layout) is not None)
        for layout in islice(layouts, _MAX_TRIED):
            weights = self._weights_of(layout)
            assert weights is not None
            yield plan_layout(self._shapes, layout, machines, self._options, weights)

    def _weights_of(self, layout: ParallelConfig) -> Sequence[Mapping[str, int]] | None:
        """None where a quantized matrix cannot be cut so."""
        if layout not in self._weights:
            try:
                self._weights[layout] = weights_by_rank(self._shapes, layout, self._options)
            except LayoutError as error:
                self._weights[layout] = error
        found = self._weights[layout]
        return None if isinstance(found, LayoutError) else found

    def _is_hopeless(self, machines: Machines) -> bool:
        """Whether all the weights, each in as few bytes as there can be, are more than all the memory."""
        text = self.counts.total - self.counts.vision
        return int(text * self._least_bytes()) > machines.num_devices * budget_of(machines.device, self._options)

    def _least_bytes(self) -> float:
        """Of one parameter."""
        quantization = self._shapes.config.quantization
        if quantization is None:
            return self._options.dtype.num_bytes
        forms = [*quantization.by_name.values(), *(form for _, form in quantization.rules)]
        return 0.5 if any(form.kind in _HALF_A_BYTE for form in forms) else 1.0

    def _impossible(self, machines: Machines, fixed: Degrees) -> str:
        tp, pp, dp = fixed.tp or 1, fixed.pp or 1, fixed.dp or 1
        if tp * pp * dp > machines.num_devices:
            return f"tp × pp × dp = {tp} × {pp} × {dp} needs {tp * pp * dp} devices; there are {machines.num_devices}"
        ep = (fixed.ep or 1) if fixed.tp else 1
        asked = ParallelConfig(tp=tp, pp=pp, dp=dp, ep=ep, determinism=fixed.determinism)
        why = refusal(self._shapes.config, asked) or self._ep_refusal(fixed.ep)
        why = why or self._balancing_refusal(fixed) or f"{machines} cannot be divided so"
        return f"no layout has the degrees asked for: {why}"

    def _balancing_refusal(self, fixed: Degrees) -> str | None:
        if not fixed.balances_experts:
            return None
        return (
            f"--enable-eplb needs ep above 1, and ep must divide num-redundant-experts={fixed.num_redundant_experts}; "
            f"ep is {fixed.ep or 'free'}"
        )

    def _ep_refusal(self, ep: int | None) -> str | None:
        """What stands against so many expert-parallel ranks, whatever the other degrees are."""
        num_experts = self._shapes.config.num_experts
        if ep is None or ep == 1:
            return None
        if num_experts == 0:
            return f"ep={ep} needs a mixture of experts, and this model is dense; use ep=1"
        if num_experts % ep:
            return f"ep={ep} does not divide the model's {num_experts} experts"
        return f"ep={ep} divides no dp × tp that the machines and the model allow"
