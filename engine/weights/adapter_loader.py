"""Brings one LoRA adapter in PEFT's form to a rank's layers: only this rank's rectangles are read, by offset.

r rank, E experts, H hidden size, I expert width.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.errors import AdapterError, CheckpointError
from engine.layers.lora import LoraExperts, LoraLayer, LoraTarget, LoraUpdate
from engine.models.registry import Model, build_model
from engine.parallel.mesh import Mesh
from engine.parameter import Split, TensorSlice
from engine.weights.adapter_config import AdapterConfig, read_adapter_config
from engine.weights.safetensors_file import FLOAT_FORMATS, TensorEntry, read_header
from engine.weights.slice_reader import TORCH_DTYPES, OpenFiles, read_slice

WEIGHTS_FILE = "adapter_model.safetensors"
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_STAGING_BYTES = 8 * 2**20
_WRAPPER = ".base_layer"
"""PEFT wraps a module once for each of its parameters that it adapts."""


@dataclass(frozen=True)
class _Factors:
    """The two tensors of one adapted module. ``module``: its name as PEFT saved it."""

    module: str
    a: TensorEntry
    b: TensorEntry


class AdapterLoader:
    """The adapters of one rank's model, by slot."""

    def __init__(self, model: Model, mesh: Mesh) -> None:
        self._layers: list[LoraLayer] = []
        self._targets: dict[str, tuple[LoraLayer, LoraTarget] | None] = {}
        """By canonical name; None for what only other ranks hold."""
        self._experts: dict[str, LoraExperts | None] = {}
        if mesh.config.pp > 1:
            self._name_other_stages(model)
        for module in _modules(model):
            if isinstance(module, LoraLayer):
                self._add_layer(module)
            elif isinstance(module, LoraExperts):
                self._add_experts(module)

    def _name_other_stages(self, model: Model) -> None:
        """Whatever the whole model has; what this stage has itself replaces it."""
        whole = build_model(model.config, Mesh(), model.config.dtype, torch.device("meta"))
        for module in _modules(whole):
            if isinstance(module, LoraLayer):
                self._targets |= {_canonical(target.name): None for target in module.targets}
            elif isinstance(module, LoraExperts):
                self._experts[_canonical(module.name)] = None

    def _add_layer(self, layer: LoraLayer) -> None:
        self._layers.append(layer)
        for target in layer.targets:
            self._targets[_canonical(target.name)] = (layer, target)

    def _add_experts(self, experts: LoraExperts) -> None:
        self._experts[_canonical(experts.name)] = experts
        for expert in range(experts.num_experts):
            for name in experts.matrix_names:
                self._targets[_canonical(f"{experts.name}.{expert}.{name}")] = None
        for layer in (*experts.gate_ups, *experts.downs):
            self._add_layer(layer)

    def load(self, slot: int, directory: str | Path, max_rank: int) -> int:
        """Fills a free slot; returns the bytes that this rank holds for it.

        Raises AdapterError, naming file and tensor or setting, where the adapter is not served or does not suit the
        model (before any weight is read), or a weight is NaN or infinite. The slot is free then.
        """
        try:
            readers = self._plan(read_adapter_config(directory, max_rank), Path(directory) / WEIGHTS_FILE)
            num_bytes = 0
            with OpenFiles() as files:
                for reader in readers:
                    for layer, update in reader.read(files):
                        layer.put(slot, update)
                        num_bytes += update.num_bytes
        except CheckpointError as error:
            self.unload(slot)
            raise AdapterError(str(error)) from error
        except BaseException:
            self.unload(slot)
            raise
        return num_bytes

    def unload(self, slot: int) -> None:
        """Frees the slot, whether or not it holds an adapter."""
        for layer in self._layers:
            layer.drop(slot)

    def _plan(self, config: AdapterConfig, path: Path) -> "list[_MatrixReader | _ExpertsReader]":
        """Checks everything; reads no weights."""
        if not path.exists() and path.with_suffix(".bin").exists():
            raise AdapterError(f"{path.parent} has only {path.stem}.bin; save the adapter as safetensors")
        readers = [self._reader(path, config, factors) for factors in _pairs(path)]
        return [reader for reader in readers if reader is not None]

    def _reader(self, path: Path, config: AdapterConfig, factors: _Factors) -> "_MatrixReader | _ExpertsReader | None":
        module = factors.module
        if (name := _canonical(module)) in self._targets:
            if (found := self._targets[name]) is None:
                return None
            rank, part = config.rank_of(module), found[1].part
            _check_shape(factors.a, (rank, part.num_inputs))
            _check_shape(factors.b, (part.num_outputs, rank))
            return _MatrixReader(*found, factors, rank, config.scale_of(module))
        while module.endswith(_WRAPPER):
            module = module.removesuffix(_WRAPPER)
        if (name := _canonical(module)) in self._experts:
            experts = self._experts[name]
            return None if experts is None else _experts_reader(experts, config, module, factors)
        raise AdapterError(
            f"{path}: tensor {factors.a.name!r} adapts {factors.module}, which cannot be adapted here; attention and "
            "feed-forward matrices and routed experts can, embeddings, output heads, norms and routers cannot"
        )


def drop_adapters(model: Model) -> None:
    """All that its layers hold."""
    for module in _modules(model):
        if isinstance(module, LoraLayer):
            for slot in module.slots:
                module.drop(slot)


def _modules(model: Model) -> Iterator[torch.nn.Module]:
    assert isinstance(model, torch.nn.Module)
    return model.modules()


def _canonical(name: str) -> str:
    """One name for a module whether it stands in a text model or in one that sees, in transformers 4 or 5."""
    return name.replace("language_model.", "").replace(".block_sparse_moe.", ".mlp.").removeprefix("model.")


def _pairs(path: Path) -> list[_Factors]:
    """Raises AdapterError where a tensor is not a LoRA factor, or one of a pair is missing."""
    try:
        entries = read_header(path).entries
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error.strerror}") from error
    modules: dict[str, dict[str, TensorEntry]] = {}
    for entry in entries:
        name = entry.name
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise AdapterError(f"{path}: tensor {name!r} is not a LoRA factor of a served kind")
        if entry.format not in FLOAT_FORMATS:
            raise AdapterError(f"{path}: tensor {name!r} is in format {entry.format}, not {' or '.join(FLOAT_FORMATS)}")
        modules.setdefault(match[1], {})[match[2]] = entry
    if not modules:
        raise AdapterError(f"{path} holds no LoRA weights")
    for module, factors in modules.items():
        if len(factors) != 2:
            raise AdapterError(f"{path}: {module} has lora_{next(iter(factors))} alone; both factors are needed")
    return [_Factors(module, factors["A"], factors["B"]) for module, factors in modules.items()]


def _check_shape(entry: TensorEntry, shape: tuple[int, int]) -> None:
    if entry.shape != shape:
        raise AdapterError(
            f"{entry.file}: tensor {entry.name!r} has shape {list(entry.shape)}; model and adapter_config.json make it "
            f"{list(shape)}"
        )


def _read(files: OpenFiles, entry: TensorEntry, start: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
    """A rectangle of a tensor, in the file's format. Raises CheckpointError where it holds NaN or infinite values."""
    tensor = torch.empty(size, dtype=TORCH_DTYPES[entry.format])
    staging = bytearray(min(_STAGING_BYTES, max(1, math.prod(entry.shape)) * entry.element_bytes))
    for _ in read_slice(files, entry, TensorSlice(entry.name, entry.shape, start, tensor), staging):
        pass
    return tensor


@dataclass(frozen=True)
class _MatrixReader:
    """Of an ordinary linear layer: A [r, in], B [out, r]."""

    layer: LoraLayer
    target: LoraTarget
    factors: _Factors
    rank: int
    scale: float

    def read(self, files: OpenFiles) -> Iterator[tuple[LoraLayer, LoraUpdate]]:
        part, rank, layer = self.target.part, self.rank, self.layer
        first_row, first_column = part.start
        down = _read(files, self.factors.a, (0, first_column), (rank, part.local_inputs))
        up = _read(files, self.factors.b, (first_row, 0), (part.local_outputs, rank))
        yield layer, _update(layer, self.target.column, down, up, self.scale)


def _update(layer: LoraLayer, column: int, down: torch.Tensor, up: torch.Tensor, scale: float) -> LoraUpdate:
    return LoraUpdate(
        column, down.contiguous().to(layer.device, layer.dtype), (up.float() * scale).to(layer.device, layer.dtype)
    )


@dataclass(frozen=True)
class _ExpertsReader:
    """Of one parameter that holds all experts: A [r · E, n], by expert first, and B [m, r · E], by expert last.

    ``is_swapped``: A belongs to the outputs and B to the inputs. ``inputs``, ``outputs``: this rank's (start, size)s.
    """

    layers: Sequence[LoraLayer]
    experts: LoraExperts
    factors: _Factors
    rank: int
    scale: float
    is_swapped: bool
    inputs: Sequence[tuple[int, int]]
    outputs: Sequence[tuple[int, int]]

    def read(self, files: OpenFiles) -> Iterator[tuple[LoraLayer, LoraUpdate]]:
        local, num_experts, rank = self.experts.local_experts, self.experts.num_experts, self.rank
        columns, rows = (self.outputs, self.inputs) if self.is_swapped else (self.inputs, self.outputs)
        of_a = torch.cat([self._of_experts(files, (at, size)) for at, size in columns], 1)
        of_b = torch.cat(
            [_read(files, self.factors.b, (at, 0), (size, rank * num_experts)) for at, size in rows], 0
        ).view(-1, rank, num_experts)
        for index, (expert, layer) in enumerate(zip(local, self.layers, strict=True)):
            a, b = of_a[index * rank : (index + 1) * rank], of_b[:, :, expert]
            down, up = (b.t(), a.t()) if self.is_swapped else (a, b)
            yield layer, _update(layer, 0, down, up, self.scale)

    def _of_experts(self, files: OpenFiles, columns: tuple[int, int]) -> torch.Tensor:
        """Rows of A, expert by expert of this rank."""
        start, size = columns
        rows = [(expert * self.rank, start) for expert in self.experts.local_experts]
        return torch.cat([_read(files, self.factors.a, first, (self.rank, size)) for first in rows])


def _experts_reader(experts: LoraExperts, config: AdapterConfig, module: str, factors: _Factors) -> _ExpertsReader:
    """The shapes tell which parameter it is and which way round it was stored."""
    hidden_size, width, split = experts.hidden_size, experts.width, experts.by_width
    whole = [(0, hidden_size)]
    halves = [_share(width, split, 0), _share(width, split, width)]
    part = [_share(width, split, 0)]
    kinds = {
        "gate_up_proj": (hidden_size, 2 * width, whole, halves, experts.gate_ups),
        "down_proj": (width, hidden_size, part, whole, experts.downs),
    }
    # PEFT takes parameters for [E, out, in] where the model does not say otherwise, which Llama 4 ([E, in, out]) did
    # not, so its factors are stored the other way round. Where both would do, the model's own way counts.
    for is_swapped in sorted((False, True), reverse=experts.is_transposed):
        for name, (num_inputs, num_outputs, inputs, outputs, layers) in kinds.items():
            rank = config.rank_of(f"{module}.{name}")
            sizes = (num_outputs, num_inputs) if is_swapped else (num_inputs, num_outputs)
            rows = rank * experts.num_experts
            if (factors.a.shape, factors.b.shape) == ((rows, sizes[0]), (sizes[1], rows)):
                scale = config.scale_of(f"{module}.{name}")
                return _ExpertsReader(layers, experts, factors, rank, scale, is_swapped, inputs, outputs)
    raise AdapterError(
        f"{factors.a.file}: tensors {factors.a.name!r} {list(factors.a.shape)} and lora_B {list(factors.b.shape)} are "
        f"not of rank {config.rank} for {experts.num_experts} experts of width {width} on {hidden_size} hidden"
    )


def _share(total: int, split: Split, offset: int) -> tuple[int, int]:
    return offset + split.start(total), split.size(total)
