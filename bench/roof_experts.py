"""A rank's experts of a layer in one call, in bfloat16 and int8, on ``num_threads`` threads that each work on their own
data, against torch's grouped product of bfloat16 weights and against one expert after another; a single token's against
reading memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bench.measure import Row, row
from bench.roof_kernels import Roofs, Work, rotating
from engine.kernels.experts import ExpertMatrices, GroupedExperts, can_group
from engine.kernels.linear import linear, linear_int8
from engine.layers.activation import silu_and_multiply

NUM_EXPERTS, HIDDEN_SIZE, WIDTH = 8, 1024, 1536
TOKENS = (8, 32, 128, 256, 1024)
_FEW_TOKENS = 256
_FEW_LAYERS = 4
"""Are gone through where computing takes longer than reading."""


@dataclass(frozen=True)
class Layer:
    """``gate_ups`` [E, 2 × I, H] and ``downs`` [E, H, I] of one layer, and the same as the kernel takes them."""

    gate_ups: torch.Tensor
    downs: torch.Tensor
    experts: Sequence[ExpertMatrices]
    grouped: GroupedExperts


@dataclass(frozen=True)
class Routed:
    """``hidden`` [N, H] in the order of the experts, and how many are each one's, [E]."""

    hidden: torch.Tensor
    counts: torch.Tensor


def run(num_repetitions: int, quick: bool, num_threads: int) -> list[Row]:
    """``quick``: data that fit into caches; shows that everything runs and nothing else."""
    previous = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        roofs = Roofs(num_threads, (160 if quick else 640) * 2**20)
        dense = _layers(roofs, torch.bfloat16)
        if not dense:
            return []  # this CPU has no tile units: there is no kernel to measure
        rounded = _layers(roofs, torch.int8)
        return [
            *_rows(roofs, torch.bfloat16, dense, dense, num_repetitions),
            *_rows(roofs, torch.int8, rounded, dense, num_repetitions),
        ]
    finally:
        torch.set_num_threads(previous)


def _rows(
    roofs: Roofs, dtype: torch.dtype, ours: list[list[Layer]], dense: list[list[Layer]], num_repetitions: int
) -> list[Row]:
    name = f"experts {str(dtype).removeprefix('torch.')} {NUM_EXPERTS} × [{HIDDEN_SIZE}, {WIDTH}]"
    rows = [_one_token(roofs, name, ours, num_repetitions)]
    for num_tokens in TOKENS:
        routed = _routed(num_tokens)
        num_layers = len(dense[0]) if num_tokens <= _FEW_TOKENS else min(_FEW_LAYERS, len(dense[0]))
        work = _through(ours, num_layers, routed, _grouped)
        references = {
            "torch._grouped_mm, bfloat16": _through(dense, num_layers, routed, _by_torch),
            "one expert after another": _through(ours, num_layers, routed, _one_by_one),
        }
        tokens = num_tokens * num_layers * roofs.num_threads
        for reference, theirs in references.items():
            note = f"÷ {reference} beside it; {roofs.num_threads} threads"
            case = f"{num_tokens} tokens, ÷ {reference}"
            pairs = _in_turns(roofs, work, theirs, tokens, num_repetitions)
            rows.append(row(name, case, "tokens/s", *pairs, "higher", note))
    return rows


def _one_token(roofs: Roofs, name: str, layers: list[list[Layer]], num_repetitions: int) -> Row:
    """Whose expert is another in every layer."""
    hidden = torch.randn(1, HIDDEN_SIZE).bfloat16()
    routed = [Routed(hidden, torch.eye(NUM_EXPERTS, dtype=torch.int64)[i]) for i in range(NUM_EXPERTS)]
    num_rounds = NUM_EXPERTS

    def work(thread: int) -> None:
        for index in range(num_rounds):
            for layer in layers[thread]:
                layer.grouped.forward(routed[index].hidden, routed[index].counts)

    one = layers[0][0]
    layer_bytes = (one.gate_ups.nbytes + one.downs.nbytes) // NUM_EXPERTS
    gigabytes = num_rounds * len(layers[0]) * layer_bytes * roofs.num_threads / 1e9
    ours, theirs = [], []
    for _ in range(num_repetitions):
        theirs.append(roofs.read_gb_s())
        ours.append(gigabytes / roofs.seconds(work))
    note = f"÷ best of 5 reads of memory in huge pages beside it; {roofs.num_threads} threads"
    return row(name, "1 token", "GB/s", ours, theirs, "higher", note)


def _in_turns(
    roofs: Roofs, work: Work, reference: Work, num_tokens: int, num_repetitions: int
) -> tuple[list[float], list[float]]:
    roofs.seconds(work)  # pages, code and scratch are there now
    roofs.seconds(reference)
    ours, theirs = [], []
    for _ in range(num_repetitions):
        theirs.append(num_tokens / roofs.seconds(reference))
        ours.append(num_tokens / roofs.seconds(work))
    return ours, theirs


def _through(
    layers: list[list[Layer]], num_layers: int, routed: Routed, compute: Callable[[Layer, Routed], torch.Tensor]
) -> Work:
    """``num_layers`` times another layer of the thread's."""

    def work(thread: int) -> None:
        for index in range(num_layers):
            compute(layers[thread][index % len(layers[thread])], routed)

    return work


def _grouped(layer: Layer, routed: Routed) -> torch.Tensor:
    return layer.grouped.forward(routed.hidden, routed.counts)


def _by_torch(layer: Layer, routed: Routed) -> torch.Tensor:
    ends = routed.counts.cumsum(0).to(torch.int32)
    inner = silu_and_multiply(torch._grouped_mm(routed.hidden, layer.gate_ups.transpose(1, 2), offs=ends))
    return torch._grouped_mm(inner, layer.downs.transpose(1, 2), offs=ends)


def _one_by_one(layer: Layer, routed: Routed) -> torch.Tensor:
    parts = zip(layer.experts, routed.hidden.split(routed.counts.tolist()), strict=True)
    return torch.cat([_by_one(expert, part) for expert, part in parts if len(part)])


def _by_one(expert: ExpertMatrices, tokens: torch.Tensor) -> torch.Tensor:
    if expert.gate_up_scales is None or expert.down_scales is None:
        return linear(silu_and_multiply(linear(tokens, expert.gate_up)), expert.down)
    inner = silu_and_multiply(linear_int8(tokens, expert.gate_up, expert.gate_up_scales))
    return linear_int8(inner, expert.down, expert.down_scales)


def _routed(num_tokens: int) -> Routed:
    """Each token's expert is drawn by chance, the same in every run."""
    experts = torch.randint(NUM_EXPERTS, (num_tokens,), generator=torch.Generator().manual_seed(num_tokens))
    hidden = torch.randn(num_tokens, HIDDEN_SIZE).bfloat16()
    return Routed(hidden, torch.bincount(experts, minlength=NUM_EXPERTS))


def _layers(roofs: Roofs, dtype: torch.dtype) -> list[list[Layer]]:
    """For each thread, layers that are together as large as the roofs' set; empty where the kernel takes none."""
    # A layer's matrices lie in one piece, gate and up first.
    rows = NUM_EXPERTS * WIDTH
    threads = rotating(roofs, (3 * rows, HIDDEN_SIZE), dtype, scale=1 / 32)
    gate_up_scales = torch.full((NUM_EXPERTS, 2 * WIDTH), 1e-3)
    down_scales = torch.full((NUM_EXPERTS, HIDDEN_SIZE), 1e-3)
    found = []
    for stack in threads:
        layers = []
        for matrices in stack:
            gate_ups = matrices[: 2 * rows].view(NUM_EXPERTS, 2 * WIDTH, HIDDEN_SIZE)
            downs = matrices[2 * rows :].view(NUM_EXPERTS, HIDDEN_SIZE, WIDTH)
            pairs = zip(gate_ups, downs, strict=True)
            experts = [ExpertMatrices(*pair) for pair in pairs]
            if dtype is torch.int8:
                scales = zip(experts, gate_up_scales, down_scales, strict=True)
                experts = [ExpertMatrices(one.gate_up, one.down, *two) for one, *two in scales]
            if not can_group(experts):
                return []
            layers.append(Layer(gate_ups, downs, experts, GroupedExperts(experts)))
        found.append(layers)
    return found
