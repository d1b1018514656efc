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
        by_expert, by_width: which experts are this rank's, and which part of each one's width.
        is_transposed: whether the model holds all experts in one tensor as [E, in, out].
    """

    def __init__(
        self,
        build: ParameterBuilder,
        hidden_size: int,
        config: MoeConfig,
        names: tuple[str, str, str],
        by_expert: Split,
        by_width: Split,
        is_transposed: bool,
    ) -> None:
        super().__init__()
        self.name = build.prefix.removesuffix(".")
        self.hidden_size, self.width = hidden_size, config.intermediate_size
        self.num_experts, self.by_width = config.num_experts, by_width
        self.matrix_names, self.is_transposed = names, is_transposed
        first = by_expert.start(config.num_experts)
        self.local_experts = range(first, first + by_expert.size(config.num_experts))
        gate_name, up_name, down_name = names
        self.gate_ups: list[LoraLayer] = []
        self.downs: list[LoraLayer] = []
        for expert in self.local_experts:
            at = build.at(str(expert))
            gate_up = [MatrixPart(name, self.width, hidden_size, outputs=by_width) for name in (gate_name, up_name)]
            self.gate_ups.append(LoraLayer(at, gate_up))
            self.downs.append(LoraLayer(at, [MatrixPart(down_name, hidden_size, self.width, inputs=by_width)]))

    @property
    def has_updates(self) -> bool:
        """Whether an adapter changes any of them."""
        return any(layer.slots for layer in (*self.gate_ups, *self.downs))
