"""The layout that a model gets on given machines, and the nearest on which it fits."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice

from cluster.plan.decode_estimate import estimate_decode
from cluster.plan.devices import Machines
from cluster.plan.dispatch import DecodeEstimate, DecodeLoad, DispatchChoice, gains
from cluster.plan.layout_plan import LayoutPlan, plan_layout
from cluster.plan.layouts import Degrees, candidates, exchanging, larger, refusal
from cluster.plan.link_cost import Link
from cluster.plan.rank_memory import PlanOptions, budget_of, weights_by_rank
from engine.config import Determinism, ParallelConfig
from engine.errors import LayoutError
from engine.models.shapes.model_shapes import ModelShapes
from engine.quantization_config import WeightFormat
from engine.weights.ledger import count_parameters

_MAX_TRIED = 8
"""Layouts that are built on the same machines. They differ in what is held twice, which is little."""
_MAX_SKETCHED = 16
"""Layouts that exchange tokens whose weights are estimated; the most promising are then built."""
_MAX_BUILT = 2
_USEFUL_MODEL_LEN = 4096
"""Tokens of a request that the nearest layout must take, unless the model or the user wants fewer; also of each request
under which the forms of expert parallelism are compared."""
_HALF_A_BYTE = (
    WeightFormat.INT4,
    WeightFormat.AWQ,
    WeightFormat.GPTQ,
    WeightFormat.NF4,
    WeightFormat.GGUF,
    WeightFormat.ONLINE_INT4,
)


class LayoutSearch:
    """For one model and set of options; shapes of a layout are built once. ``link``: of every two hosts, where it is
    known; else no tokens are exchanged between hosts unless nothing else fits."""

    def __init__(self, shapes: ModelShapes, options: PlanOptions, link: Link | None = None) -> None:
        self._shapes = shapes
        self._options = options
        self._link = link
        wanted = options.max_model_len or shapes.config.max_context_len
        self._load = DecodeLoad(options.max_num_seqs, min(wanted, _USEFUL_MODEL_LEN))
        self.counts = count_parameters(shapes)
        self._weights: dict[ParallelConfig, Sequence[Mapping[str, int]] | LayoutError] = {}

    def choose(self, machines: Machines, fixed: Degrees) -> LayoutPlan:
        """The best legal layout that fits; where none does, the best.

        Raises LayoutError where the degrees that the user fixed are impossible, and InvalidOption where deterministic
        mode serves no such model.
        """
        if self._is_hopeless(machines):
            found = self._first_built(machines, fixed)
        else:
            found = self._best(machines, fixed, lambda plan: plan.fits)
        if found is not None:
            return found
        refused = [error for error in self._weights.values() if isinstance(error, LayoutError)]
        raise refused[0] if refused else LayoutError(self._impossible(machines, fixed))

    def nearest(self, machines: Machines, determinism: Determinism = Determinism.OFF) -> LayoutPlan | None:
        """The first that fits, with requests of a useful length, on these machines or the fewest more of their kind;
        None where none was found."""
        for grown in (machines, *larger(machines)):
            if self._is_hopeless(grown):
                continue
            found = self._best(grown, Degrees(determinism=determinism), self._is_useful)
            if found is not None and self._is_useful(found):
                return found
        return None

    def _is_useful(self, plan: LayoutPlan) -> bool:
        return plan.max_model_len >= self._load.context_len

    def _first_built(self, machines: Machines, fixed: Degrees) -> LayoutPlan | None:
        config = self._shapes.config
        plans = (self._plans(layouts(config, machines, fixed), machines) for layouts in (candidates, exchanging))
        return next((plan for each in plans for plan in each), None)

    def _best(self, machines: Machines, fixed: Degrees, is_good: Callable[[LayoutPlan], bool]) -> LayoutPlan | None:
        """The first good one of those without attention replicas, or one with them that is better; where none is good,
        the first. None where no layout is legal."""
        config = self._shapes.config
        first: LayoutPlan | None = None
        replicated: LayoutPlan | None = None
        for plan in self._plans(candidates(config, machines, fixed), machines):
            first = first or plan
            if is_good(plan):
                replicated = plan
                break
        over_hosts = self._link is not None or replicated is None
        layouts = list(islice(exchanging(config, machines, fixed, over_hosts=over_hosts), _MAX_SKETCHED))
        first = first or next(self._plans(layouts, machines), None)
        if first is None or not layouts:
            return replicated or first
        return self._better(layouts, replicated, first, is_good) or first

    def _better(
        self,
        layouts: Sequence[ParallelConfig],
        replicated: LayoutPlan | None,
        built: LayoutPlan,
        is_good: Callable[[LayoutPlan], bool],
    ) -> LayoutPlan | None:
        """A good one of ``layouts`` that decodes more than ``replicated`` does, or else that; each with what spoke for
        it. ``built``: any layout on the same machines whose weights are known."""
        before = None if replicated is None else self._estimate(replicated)
        sketches = [self._plan(layout, built.machines, _like(built, layout)) for layout in layouts]
        promising = sorted(sketches, key=lambda plan: -self._estimate(plan).tokens_per_s)
        after = self._estimate(promising[0])
        for sketch in promising[:_MAX_BUILT]:
            if not gains(self._estimate(sketch), before):
                break
            if (weights := self._weights_of(sketch.layout)) is None:
                continue
            plan = self._plan(sketch.layout, built.machines, weights)
            after = self._estimate(plan)
            if is_good(plan) and gains(after, before):
                return replace(plan, dispatch=self._choice(before, after))
        return replicated and replace(replicated, dispatch=self._choice(before, after))

    def _choice(self, before: DecodeEstimate | None, after: DecodeEstimate) -> DispatchChoice:
        return DispatchChoice(self._load, before, after if after.num_requests else None, self._link is not None)

    def _estimate(self, plan: LayoutPlan) -> DecodeEstimate:
        options = self._options
        return estimate_decode(self._shapes.config, plan, self._load, options.dtype, options.block_size, self._link)

    def _plans(self, layouts: Iterable[ParallelConfig], machines: Machines) -> Iterator[LayoutPlan]:
        possible = (layout for layout in layouts if self._weights_of(layout) is not None)
        for layout in islice(possible, _MAX_TRIED):
            weights = self._weights_of(layout)
            assert weights is not None
            yield self._plan(layout, machines, weights)

    def _plan(self, layout: ParallelConfig, machines: Machines, weights: Sequence[Mapping[str, int]]) -> LayoutPlan:
        return plan_layout(self._shapes, layout, machines, self._options, weights)

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


def _like(built: LayoutPlan, layout: ParallelConfig) -> list[Mapping[str, int]]:
    """About what the ranks of ``layout`` hold: the experts once, all else once for each dp group."""
    totals = Counter[str]()
    for rank in built.ranks:
        totals.update(rank.weights)
    for kind in totals.keys() - {"experts"}:
        totals[kind] = totals[kind] * layout.dp // built.layout.dp
    return [{kind: total // layout.num_ranks for kind, total in totals.items()}] * layout.num_ranks
