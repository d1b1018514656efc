"""Pieces that ranks may take from one another: equal keys mean equal bytes, in every format, in every layout."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from engine.config import Dtype, LoadFormat, ParallelConfig
from engine.model_config import ModelConfig
from engine.models.registry import build_model
from engine.parallel.mesh import Mesh
from engine.weights.loader import load_weights
from engine.weights.shared_pieces import Piece, PieceKeys, Shard, blocks_of, bytes_of, destinations, fill_block
from tests.quantization.checkpoints import FORMATS as EIGHT_BITS
from tests.quantization.four_bit_checkpoints import FORMATS as FOUR_BITS

CPU = torch.device("cpu")
LAYOUTS = [ParallelConfig(), ParallelConfig(dp=2), ParallelConfig(dp=2, tp=2), ParallelConfig(tp=2, pp=2)]
RUNS = {"checkpoint": "one", "torch": "2"}


def load(directory: Path, mesh: Mesh, dtype: Dtype, quantization: str | None) -> tuple[list[Piece], PieceKeys]:
    model = build_model(ModelConfig.from_directory(directory, quantization), mesh, dtype, CPU)
    load_weights(model, directory)
    return [*model.slices, *model.conversions], keys_of(mesh, dtype, quantization)


def keys_of(mesh: Mesh, dtype: Dtype = Dtype.FLOAT32, quantization: str | None = None) -> PieceKeys:
    return PieceKeys(RUNS, LoadFormat.SAFETENSORS, dtype, quantization, mesh, CPU)


def content_of(piece: Piece) -> bytes:
    return b"".join(bytes(bytes_of(block)) for block in blocks_of(destinations(piece), 1000))


def meshes() -> Iterator[Mesh]:
    for layout in LAYOUTS:
        for rank in range(layout.num_ranks):
            yield Mesh(layout, rank)


ONLINE = ["int8", "int4", "fp8"]
FORMATS = EIGHT_BITS | FOUR_BITS
OFTEN = ["int8-bitsandbytes", "fp8-fbgemm", "int4-awq", "int4-gptq-desc-act", "nf4"]


@pytest.mark.parametrize(
    "form",
    ["", *ONLINE, *(name if name in OFTEN else pytest.param(name, marks=pytest.mark.full) for name in FORMATS)],
)
def test_equal_keys_mean_equal_bytes(float_dir: Callable[[str], Path], tmp_path: Path, form: str) -> None:
    directory, quantization = float_dir("llama"), form if form in ONLINE else None
    if form in FORMATS:
        FORMATS[form].quantize(directory, tmp_path)
        directory = tmp_path
    # In bfloat16 four-bit codes lie as torch's kernel for that wants them.
    dtype = Dtype.BFLOAT16 if form in FOUR_BITS or form == "int4" else Dtype.FLOAT32
    content: dict[bytes, bytes] = {}
    by_rank: dict[tuple[ParallelConfig, int], set[bytes]] = {}
    num_met_again = 0
    for mesh in meshes():
        pieces, keys = load(directory, mesh, dtype, quantization)
        held = by_rank[mesh.config, mesh.rank] = set()
        for piece in pieces:
            key = keys.of(piece)
            assert key is not None, "nothing here is an expert's"
            held.add(key)
            num_met_again += key in content
            assert content.setdefault(key, content_of(piece)) == content_of(piece)
    assert num_met_again > 0
    for mesh in meshes():
        sibling = (mesh.rank + mesh.config.tp) % mesh.config.num_ranks
        if mesh.config.dp > 1:
            assert by_rank[mesh.config, mesh.rank] == by_rank[mesh.config, sibling]


def test_experts_are_nobody_elses(float_dir: Callable[[str], Path]) -> None:
    for kind in ("moe", "mixtral"):
        mesh = Mesh(ParallelConfig(dp=2, ep=2), 1)
        config = ModelConfig.from_directory(float_dir(kind))
        for quantization in (None, "int4"):
            config = ModelConfig.from_directory(float_dir(kind), quantization)
            model = build_model(config, mesh, Dtype.FLOAT32, torch.device("meta"))
            keys = keys_of(mesh, quantization=quantization)
            experts = sum(".experts." in piece.name for piece in model.slices)
            experts += sum(".experts." in conversion.sources[0].name for conversion in model.conversions)
            without = [piece for piece in (*model.slices, *model.conversions) if keys.of(piece) is None]
            assert len(without) == experts > 0


def test_what_decides_about_the_bytes_is_in_the_key(float_dir: Callable[[str], Path]) -> None:
    mesh = Mesh(ParallelConfig(dp=2), 0)
    model = build_model(ModelConfig.from_directory(float_dir("llama"), "int4"), mesh, Dtype.FLOAT32, CPU)
    others = [
        PieceKeys(RUNS | {"checkpoint": "two"}, LoadFormat.SAFETENSORS, Dtype.FLOAT32, "int4", mesh, CPU),
        PieceKeys(RUNS, LoadFormat.DUMMY, Dtype.FLOAT32, "int4", mesh, CPU),
        PieceKeys(RUNS, LoadFormat.SAFETENSORS, Dtype.BFLOAT16, "int4", mesh, CPU),
        PieceKeys(RUNS, LoadFormat.SAFETENSORS, Dtype.FLOAT32, "int8", mesh, CPU),
    ]
    keys = PieceKeys(RUNS, LoadFormat.SAFETENSORS, Dtype.FLOAT32, "int4", mesh, CPU)
    found = [keys.of(piece) for piece in (*model.slices, *model.conversions)]
    assert model.conversions and len(set(found)) == len(found)
    for other in others:
        assert not set(found) & {other.of(piece) for piece in (*model.slices, *model.conversions)}
    # A tensor that is read whole is cut by the conversion: another tp rank's is not this one's.
    neighbour = keys_of(Mesh(ParallelConfig(dp=2, tp=2), 1), quantization="int4")
    first = keys_of(Mesh(ParallelConfig(dp=2, tp=2), 0), quantization="int4")
    assert {first.of(each) for each in model.conversions}.isdisjoint(neighbour.of(each) for each in model.conversions)


def test_what_has_changed_since_it_was_loaded_is_held_no_more(float_dir: Callable[[str], Path]) -> None:
    pieces, keys = load(float_dir("llama"), Mesh(), Dtype.FLOAT32, None)
    shard = Shard(pieces, keys)
    of_piece = [(key, piece) for piece in pieces if (key := keys.of(piece)) is not None]
    for key, piece in of_piece:
        held = shard.get(key)
        assert held is not None and [each.data_ptr() for each in held] == [t.data_ptr() for t in destinations(piece)]
    assert shard.get(b"k" * 16) is None
    key, changed = of_piece[3]
    with torch.inference_mode():
        destinations(changed)[0].view(-1)[:1].add_(1)
    assert shard.get(key) is None
    assert sum(shard.get(key) is None for key, _ in of_piece) < len(of_piece)


@pytest.mark.parametrize("most_bytes", [4, 60, 1 << 20])
def test_blocks_carry_any_layout(most_bytes: int) -> None:
    whole = torch.arange(4 * 6 * 5, dtype=torch.float32).view(4, 6, 5)
    tensors = [whole, whole.transpose(0, 1), whole[:, 1:3], whole[0, 0]]
    for tensor in [*tensors, torch.tensor(3.0), torch.arange(9, dtype=torch.uint8)[::2]]:
        copy = torch.zeros(tensor.shape, dtype=tensor.dtype)
        pairs = list(zip(blocks_of([tensor], most_bytes), blocks_of([copy], most_bytes), strict=True))
        assert all(source.nbytes <= most_bytes for source, _ in pairs)
        for source, target in pairs:
            fill_block(target, bytes_of(source))
        assert torch.equal(copy, tensor)
