"""The routed experts of a layer: this rank's, each a gated feed-forward network.

N (token, expert) pairs, E experts, H hidden size, I expert width. Experts are divided over ep ranks, each expert's
width over the expert_tp ranks that remain. Which experts a rank holds may change while it serves.
"""

import abc
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from engine.batch import StepAdapters
from engine.config import Determinism
from engine.kernels.experts import ExpertMatrices, GroupedExperts, can_group
from engine.kernels.fixed_linear import fixed_linear
from engine.kernels.gpu_experts import gpu_experts, gpu_sorted_experts
from engine.kernels.linear import linear
from engine.layer_config import MoeConfig
from engine.layers.activation import silu_and_multiply
from engine.layers.lora import LoraExperts
from engine.parallel.expert_balance import linear_placement
from engine.parallel.ordered_sum import tree_sum
from engine.parameter import Conversion, ParameterBuilder, Split, TensorSlice
from engine.quantization.matrix import FloatSource, MatrixPart, WeightMatrix
from engine.quantization.registry import make_input_divided, make_matrix
from engine.quantization_config import WeightFormat

_ONLINE = (WeightFormat.ONLINE_FP8, WeightFormat.ONLINE_INT8, WeightFormat.ONLINE_INT4)


@dataclass(frozen=True)
class ExpertNames:
    """What a checkpoint calls the three matrices of an expert, below ``experts.N.``.

    ``is_fused``: unquantized checkpoints hold all experts in one tensor instead, as Llama 4's do: ``gate_up_proj``
    [E, H, 2 × I], gate first, and ``down_proj`` [E, I, H].
    """

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    is_fused: bool = False


class Experts(nn.Module, abc.ABC):
    """What this rank holds of a layer's experts: one in each of ``num_slots`` slots, of each an equal share of the
    width.

    ``held``: by slot the expert that is there; None while it is being replaced. ``first_slot``: the number of this
    rank's first slot among those of all ep ranks. ``experts``: those to hold, where not this rank's of the linear
    placement (engine.parallel.expert_balance).
    """

    def __init__(
        self,
        build: ParameterBuilder,
        hidden_size: int,
        config: MoeConfig,
        names: ExpertNames,
        experts: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        parallel, mesh = build.mesh.config, build.mesh
        num_slots = parallel.num_expert_slots(config.num_experts)
        if experts is None:
            experts = linear_placement(config.num_experts, parallel.ep, num_slots).slots[mesh.ep_rank]
        self.held: list[int | None] = list(experts)
        self.num_slots = len(experts)
        self.first_slot = mesh.ep_rank * num_slots
        self.by_width = Split(parallel.expert_tp, mesh.expert_tp_rank)
        self._determinism = build.mesh.config.determinism
        self._multiply = fixed_linear if build.mesh.config.is_deterministic else linear
        self._num_shards = build.mesh.config.num_shards // self.by_width.degree
        matrix_names = (names.gate, names.up, names.down)
        self.lora = LoraExperts(
            build, hidden_size, config, matrix_names, experts, self.by_width, is_transposed=names.is_fused
        )
        self._build, self._hidden_size, self._config, self._names = build, hidden_size, config, names

    def staged(self, expert: int) -> "StagedExpert":
        """The same for another expert alone, in memory of its own and not yet loaded. From any thread."""
        build = self._build.apart()
        experts = type(self)(build, self._hidden_size, self._config, self._names, [expert])
        return StagedExpert(expert, experts, tuple(build.slices), tuple(build.conversions))

    def put(self, slot: int, staged: "StagedExpert") -> None:
        """From now on ``slot`` holds what was staged and loaded. In place, for kernels have addresses."""
        self.held[slot] = None
        for mine, new in zip(self.tensors(slot), staged.experts.tensors(0), strict=True):
            mine.copy_(new)
        self.lora.put(slot, staged.expert)
        self.held[slot] = staged.expert

    def can_put(self, slot: int, staged: "StagedExpert") -> bool:
        """Not where a checkpoint has experts of one layer in different formats."""
        mine, new = self.tensors(slot), staged.experts.tensors(0)
        return [(one.shape, one.dtype) for one in mine] == [(one.shape, one.dtype) for one in new]

    @abc.abstractmethod
    def tensors(self, slot: int) -> list[torch.Tensor]:
        """All that belongs to the expert in a slot, in an order that depends on the format alone."""

    @abc.abstractmethod
    def gate_up(self, expert: int, tokens: torch.Tensor) -> torch.Tensor:
        """[n, H] to [n, 2 × local I], gate first, by the expert in that slot."""

    @abc.abstractmethod
    def down(self, expert: int, inner: torch.Tensor) -> torch.Tensor:
        """[n, local I] to this rank's summand of [n, H]."""

    @abc.abstractmethod
    def matrices(self) -> list[ExpertMatrices] | None:
        """Of each local expert, as the CPU's kernel takes them; None in formats that it does not know."""

    def forward_routed(
        self, hidden: torch.Tensor, expert_ids: torch.Tensor, scores: torch.Tensor, *, scales_inputs: bool
    ) -> torch.Tensor | None:
        """All at once, without sorting: [T, H] with ids and scores [T, K] to this rank's summand of [T, H]. None
        where there is no such kernel, as for all but unquantized experts on GPUs."""
        return None

    def _sorted_on_gpu(self, tokens: torch.Tensor, counts: torch.Tensor) -> torch.Tensor | None:
        """As ``forward`` without adapters, where a GPU has kernels for it."""
        return None

    @functools.cached_property
    def _grouped(self) -> GroupedExperts | None:
        matrices = self.matrices()
        return GroupedExperts(matrices) if matrices is not None and can_group(matrices) else None

    def forward(self, tokens: torch.Tensor, counts: torch.Tensor, adapters: StepAdapters | None = None) -> torch.Tensor:
        """[N, H] sorted by local expert, with how many belong to each, int64, to this rank's summand of [N, H]; under
        D2 in float32, see engine.parallel.ordered_sum.

        ``adapters``: of the N pairs.
        """
        is_plain = adapters is None or not self.lora.has_updates
        in_order = self._determinism is Determinism.D2
        if is_plain and tokens.dtype == torch.bfloat16 and not in_order and self._grouped is not None:
            return self._grouped.forward(tokens, counts)
        if (
            is_plain
            and self._determinism is Determinism.OFF
            and (outputs := self._sorted_on_gpu(tokens, counts)) is not None
        ):
            return outputs
        return self._one_by_one(tokens, counts.tolist(), None if is_plain else adapters)

    def _one_by_one(self, tokens: torch.Tensor, counts: list[int], adapters: StepAdapters | None) -> torch.Tensor:
        in_order = self._determinism is Determinism.D2
        outputs = torch.empty_like(tokens, dtype=torch.float32 if in_order else tokens.dtype)
        shares = [None] * len(counts) if adapters is None else adapters.split(counts)
        start = 0
        for expert, (count, share) in enumerate(zip(counts, shares, strict=True)):
            if count:
                inputs = tokens[start : start + count]
                gate_up = self.lora.gate_ups[expert].add_to(self.gate_up(expert, inputs), inputs, share)
                inner = silu_and_multiply(gate_up)
                outputs[start : start + count] = self.lora.downs[expert].add_to(self.down(expert, inner), inner, share)
            start += count
        return outputs


class StackedExperts(Experts):
    """Unquantized: all experts' matrices in two tensors, [E, 2 × local I, H], gate first, and [E, H, local I]."""

    def __init__(
        self,
        build: ParameterBuilder,
        hidden_size: int,
        config: MoeConfig,
        names: ExpertNames,
        experts: Sequence[int] | None = None,
    ) -> None:
        super().__init__(build, hidden_size, config, names, experts)
        width, local_width = config.intermediate_size, self.by_width.size(config.intermediate_size)
        start = self.by_width.start(width)
        self.gate_up_weights = build.empty(self.num_slots, 2 * local_width, hidden_size)
        self.down_weights = build.empty(self.num_slots, hidden_size, local_width)
        if names.is_fused:
            shape = (config.num_experts, hidden_size, 2 * width)
            gates, ups = self.gate_up_weights.transpose(1, 2).chunk(2, dim=-1)
            downs = self.down_weights.transpose(1, 2)
            for slots, first in _runs(self.lora.local_experts):
                build.fill(gates[slots], "gate_up_proj", shape, (first, 0, start))
                build.fill(ups[slots], "gate_up_proj", shape, (first, 0, width + start))
                build.fill(downs[slots], "down_proj", (config.num_experts, width, hidden_size), (first, start, 0))
            return
        for slot, expert in enumerate(self.lora.local_experts):
            at = build.at(str(expert))
            gate, up = self.gate_up_weights[slot].chunk(2)
            at.fill(gate, f"{names.gate}.weight", (width, hidden_size), (start, 0))
            at.fill(up, f"{names.up}.weight", (width, hidden_size), (start, 0))
            at.fill(self.down_weights[slot], f"{names.down}.weight", (hidden_size, width), (0, start))

    def tensors(self, slot: int) -> list[torch.Tensor]:
        return [self.gate_up_weights[slot], self.down_weights[slot]]

    def forward_routed(
        self, hidden: torch.Tensor, expert_ids: torch.Tensor, scores: torch.Tensor, *, scales_inputs: bool
    ) -> torch.Tensor | None:
        if self._determinism is not Determinism.OFF:
            return None  # few tokens and many would be computed in different ways
        weights = self.gate_up_weights, self.down_weights
        return gpu_experts(hidden, expert_ids, scores, *weights, self.first_slot, scales_inputs=scales_inputs)

    def _sorted_on_gpu(self, tokens: torch.Tensor, counts: torch.Tensor) -> torch.Tensor | None:
        return gpu_sorted_experts(tokens, counts, self.gate_up_weights, self.down_weights)

    def matrices(self) -> list[ExpertMatrices]:
        return [ExpertMatrices(*pair) for pair in zip(self.gate_up_weights, self.down_weights, strict=True)]

    def gate_up(self, expert: int, tokens: torch.Tensor) -> torch.Tensor:
        return self._multiply(tokens, self.gate_up_weights[expert])

    def down(self, expert: int, inner: torch.Tensor) -> torch.Tensor:
        if self._determinism is not Determinism.D2:
            return self._multiply(inner, self.down_weights[expert])
        shards = zip(
            inner.chunk(self._num_shards, 1), self.down_weights[expert].chunk(self._num_shards, 1), strict=True
        )
        return tree_sum(self._multiply(part, weight.contiguous()) for part, weight in shards)


class QuantizedExperts(Experts):
    """Each expert's matrices by themselves, quantized."""

    def __init__(
        self,
        build: ParameterBuilder,
        hidden_size: int,
        config: MoeConfig,
        names: ExpertNames,
        experts: Sequence[int] | None = None,
    ) -> None:
        super().__init__(build, hidden_size, config, names, experts)
        gate_ups, downs = [], []
        for expert in self.lora.local_experts:
            gate, up, down = self._parts(build, hidden_size, config, names, expert)
            gate_ups.append(make_matrix(build, [gate, up]))
            downs.append(make_input_divided(build, down))
        self.gate_ups, self.downs = nn.ModuleList(gate_ups), nn.ModuleList(downs)

    def tensors(self, slot: int) -> list[torch.Tensor]:
        modules = self.gate_ups[slot], self.downs[slot]
        return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]

    def _parts(
        self, build: ParameterBuilder, hidden_size: int, config: MoeConfig, names: ExpertNames, expert: int
    ) -> list[MatrixPart]:
        """Gate, up and down of one expert, by its number in the model."""
        width, split = config.intermediate_size, self.by_width
        gate, up, down = (f"{expert}.{name}" for name in (names.gate, names.up, names.down))
        from_gate = from_up = from_down = None
        form = build.format_of(gate)
        if names.is_fused and form is not None and form.kind in _ONLINE:
            start = split.start(width)
            shape = (config.num_experts, hidden_size, 2 * width)
            from_gate = FloatSource("gate_up_proj", shape, (expert, 0, start))
            from_up = FloatSource("gate_up_proj", shape, (expert, 0, width + start))
            from_down = FloatSource("down_proj", (config.num_experts, width, hidden_size), (expert, start, 0))
        return [
            MatrixPart(gate, width, hidden_size, outputs=split, fused=from_gate),
            MatrixPart(up, width, hidden_size, outputs=split, fused=from_up),
            MatrixPart(down, hidden_size, width, inputs=split, fused=from_down),
        ]

    def matrices(self) -> list[ExpertMatrices] | None:
        found = []
        for gate_up, down in zip(self.gate_ups, self.downs, strict=True):
            first, second = _matrix(gate_up).int8_codes(), _matrix(down).int8_codes()
            if first is None or second is None:
                return None
            found.append(ExpertMatrices(first[0], second[0], first[1], second[1]))
        return found

    def gate_up(self, expert: int, tokens: torch.Tensor) -> torch.Tensor:
        return _matrix(self.gate_ups[expert]).forward(tokens)

    def down(self, expert: int, inner: torch.Tensor) -> torch.Tensor:
        return _matrix(self.downs[expert]).forward(inner)


@dataclass(frozen=True)
class StagedExpert:
    """``experts`` holds ``expert`` alone; the loader fills it from ``slices`` and ``conversions``."""

    expert: int
    experts: Experts
    slices: tuple[TensorSlice, ...]
    conversions: tuple[Conversion, ...]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.experts.tensors(0))


def make_experts(build: ParameterBuilder, hidden_size: int, config: MoeConfig, names: ExpertNames) -> Experts:
    """``build``: the builder of the experts' own prefix."""
    form = build.format_of(f"0.{names.gate}")
    return (StackedExperts if form is None else QuantizedExperts)(build, hidden_size, config, names)


def _runs(experts: Sequence[int]) -> Iterator[tuple[slice, int]]:
    """Slots whose experts follow one another: the slots, and the first of their experts."""
    start = 0
    for end in range(1, len(experts) + 1):
        if end == len(experts) or experts[end] != experts[end - 1] + 1:
            yield slice(start, end), experts[start]
            start = end


def _matrix(module: nn.Module) -> WeightMatrix:
    assert isinstance(module, WeightMatrix)
    return module
