"""What LoRA adapters (arXiv 2106.09685) add to linear layers: y += (x downᵀ) upᵀ, for each token by its own adapter.

T tokens. ``down`` is [rank, in] and ``up`` [out, rank], the adapter's scale included. Where a layer's outputs are
divided over ranks, ``down`` is whole and ``up`` has this rank's rows; where its inputs are, ``down`` has this rank's
columns and ``up`` is whole, so that what is added joins the layer's partial sum before it is reduced.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from engine.batch import StepAdapters
from engine.layer_config import MoeConfig
from engine.parameter import ParameterBuilder, Split
from engine.quantization.matrix import MatrixPart


@dataclass(frozen=True)
class LoraUpdate:
    """One adapter's change of ``up.shape[0]`` outputs of a layer, from output ``column``. Shapes: see above."""

    column: int
    down: torch.Tensor
    up: torch.Tensor

    @property
    def num_bytes(self) -> int:
        return self.down.nbytes + self.up.nbytes


@dataclass(frozen=True)
class LoraTarget:
    """A checkpoint matrix that adapters may change: its whole name, without ``.weight``, its part on this rank, and
    where its outputs begin among the layer's."""

    name: str
    part: MatrixPart
    column: int


class LoraLayer(nn.Module):
    """The adapters of one linear layer, by slot."""

    def __init__(self, build: ParameterBuilder, parts: Sequence[MatrixPart]) -> None:
        super().__init__()
        self.dtype, self.device = build.dtype, build.device
        self.targets: list[LoraTarget] = []
        column = 0
        for part in parts:
            self.targets.append(LoraTarget(build.prefix + part.name, part, column))
            column += part.local_outputs
        self._updates: dict[int, list[LoraUpdate]] = {}

    def put(self, slot: int, update: LoraUpdate) -> None:
        self._updates.setdefault(slot, []).append(update)

    @property
    def slots(self) -> set[int]:
        """Of the adapters that change this layer."""
        return set(self._updates)

    def drop(self, slot: int) -> None:
        """Forgets the slot's adapter, if there is one."""
        self._updates.pop(slot, None)

    def add_to(self, output: torch.Tensor, hidden: torch.Tensor, adapters: StepAdapters | None) -> torch.Tensor:
        """Changes ``output`` [T, out] in place, the layer's result for ``hidden`` [T, in], and returns it."""
        if adapters is None or not self._updates:
            return output
        for slot, rows in adapters.rows:
            updates = self._updates.get(slot)
            if updates is None or not len(rows):
                continue
            inputs = hidden[rows]
            for update in updates:
                columns = output[:, update.column : update.column + update.up.shape[0]]
                columns.index_add_(0, rows, inputs @ update.down.t() @ update.up.t())
        return output


class LoraExperts(nn.Module):
    """The adapters of a layer's routed experts.

    Args:
        build: of the experts' own prefix.
        hidden_size: H.
        config: number and width I of the experts.
        names: of an expert's gate, up and down matrices.
        local_experts: this rank's.
        by_width: which part of each one's width is this rank's.
        is_transposed: whether the model holds all experts in one tensor as [E, in, out].
    """

    def __init__(
        self,
        build: ParameterBuilder,
        hidden_size: int,
        config: MoeConfig,
        names: tuple[str, str, str],
        local_experts: Sequence[int],
        by_width: Split,
        is_transposed: bool,
    ) -> None:
        super().__init__()
        self.name = build.prefix.removesuffix(".")
        self.hidden_size, self.width = hidden_size, config.intermediate_size
        self.num_experts, self.by_width = config.num_experts, by_width
        self.matrix_names, self.is_transposed = names, is_transposed
        self.local_experts = list(local_experts)
        self._build = build
        layers = [self._layers(expert) for expert in local_experts]
        self.gate_ups = [gate_up for gate_up, _ in layers]
        self.downs = [down for _, down in layers]

    def _layers(self, expert: int) -> tuple[LoraLayer, LoraLayer]:
        at = self._build.at(str(expert))
        *gate_up_names, down_name = self.matrix_names
        gate_up = [MatrixPart(name, self.width, self.hidden_size, outputs=self.by_width) for name in gate_up_names]
        down = [MatrixPart(down_name, self.hidden_size, self.width, inputs=self.by_width)]
        return LoraLayer(at, gate_up), LoraLayer(at, down)

    def put(self, slot: int, expert: int) -> None:
        """Another expert is in a slot; its adapters are not loaded."""
        self.local_experts[slot] = expert
        self.gate_ups[slot], self.downs[slot] = self._layers(expert)

    @property
    def has_updates(self) -> bool:
        """Whether an adapter changes any of them."""
        return any(layer.slots for layer in (*self.gate_ups, *self.downs))
