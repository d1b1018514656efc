"""Loading by offset: the right bytes and no others, and errors that name file and tensor before anything is read."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import engine.weights.loader as loader
import engine.weights.slice_reader as slice_reader
from engine.config import Dtype, LoadFormat, ParallelConfig
from engine.errors import CheckpointError
from engine.model_config import ModelConfig
from engine.models.registry import Model, build_model
from engine.parallel.mesh import Mesh
from engine.weights.loader import load_weights, verify_checkpoint

CONFIG: dict[str, Any] = {
    "architectures": ["Llama4ForCausalLM"],
    "vocab_size": 51,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 16,
    "intermediate_size_mlp": 24,
    "interleave_moe_layer_step": 2,
    "num_local_experts": 4,
    "max_position_embeddings": 128,
    "attention_bias": True,
    "dtype": "float32",
}
LAYOUTS = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]


def tensors_of(config: ModelConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A random tensor for every name that the model needs."""
    generator = torch.Generator().manual_seed(0)
    pieces = build_model(config, Mesh(), Dtype.FLOAT32, torch.device("meta")).slices
    return {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in sorted({(piece.name, piece.shape) for piece in pieces})
    }


def write_sharded(directory: Path, tensors: dict[str, torch.Tensor], num_files: int = 3) -> None:
    (directory / "config.json").write_text(json.dumps(CONFIG))
    names = sorted(tensors)
    weight_map = {name: f"model-{i % num_files}.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(weight_map.values())):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def config() -> ModelConfig:
    return ModelConfig.from_hf(CONFIG)


@pytest.fixture
def checkpoint(tmp_path: Path, config: ModelConfig) -> Path:
    write_sharded(tmp_path, tensors_of(config, torch.float32))
    return tmp_path


def make_model(config: ModelConfig, tp: int = 1, ep: int = 1, rank: int = 0, dtype: Dtype = Dtype.FLOAT32) -> Model:
    return build_model(config, Mesh(ParallelConfig(tp=tp, ep=ep), rank), dtype, torch.device("cpu"))


def expect_slices(model: Model, tensors: dict[str, torch.Tensor]) -> None:
    for piece in model.slices:
        area = tuple(slice(s, s + n) for s, n in zip(piece.start, piece.destination.shape, strict=True))
        expected = tensors[piece.name][area].to(piece.destination.dtype)
        torch.testing.assert_close(piece.destination, expected, rtol=0, atol=0, msg=piece.name)


@pytest.mark.parametrize("staging_bytes", [64, 1000, 8 * 1024 * 1024])
@pytest.mark.parametrize("min_run_bytes", [0, 48, 4096])
@pytest.mark.parametrize(("tp", "ep"), LAYOUTS)
def test_each_rank_gets_its_slices(
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: Path,
    config: ModelConfig,
    tp: int,
    ep: int,
    staging_bytes: int,
    min_run_bytes: int,
) -> None:
    """Against safetensors' own reader, with blocks cut in every dimension and with short runs read in full or not."""
    monkeypatch.setattr(loader, "_STAGING_BYTES", staging_bytes)
    monkeypatch.setattr(slice_reader, "_MIN_RUN_BYTES", min_run_bytes)
    tensors = {name: t for file in checkpoint.glob("*.safetensors") for name, t in load_file(file).items()}
    for rank in range(tp):
        model = make_model(config, tp, ep, rank)
        load_weights(model, checkpoint)
        expect_slices(model, tensors)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("served", list(Dtype))
def test_formats_are_converted(tmp_path: Path, config: ModelConfig, stored: torch.dtype, served: Dtype) -> None:
    tensors = tensors_of(config, stored)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, tmp_path / "model.safetensors")
    model = make_model(config, 2, 2, 1, served)
    load_weights(model, tmp_path)
    expect_slices(model, tensors)


def test_only_own_bytes_are_read(monkeypatch: pytest.MonkeyPatch, checkpoint: Path, config: ModelConfig) -> None:
    monkeypatch.setattr(slice_reader, "_MIN_RUN_BYTES", 0)
    num_read = 0
    preadv = os.preadv

    def counting(descriptor: int, buffers: Any, offset: int) -> int:
        nonlocal num_read
        num_read += (count := preadv(descriptor, buffers, offset))
        return count

    monkeypatch.setattr(os, "preadv", counting)
    model = make_model(config, 4, 2, 3)
    assert load_weights(model, checkpoint) == num_read == sum(piece.num_bytes for piece in model.slices)


def test_progress_reaches_the_total(checkpoint: Path, config: ModelConfig) -> None:
    seen: list[tuple[int, int]] = []
    model = make_model(config, 2, 1, 0)
    total = load_weights(model, checkpoint, on_progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert {whole for _, whole in seen} == {total}


def test_dummy_weights_need_no_files_and_repeat(tmp_path: Path, config: ModelConfig) -> None:
    models = [make_model(config, 2, 1, 1) for _ in range(2)]
    for model in models:
        assert load_weights(model, tmp_path, LoadFormat.DUMMY) == sum(piece.num_bytes for piece in model.slices)
    for one, other in zip(models[0].slices, models[1].slices, strict=True):
        assert torch.equal(one.destination, other.destination)
    by_name = {piece.name: piece.destination for piece in models[0].slices}
    assert by_name["model.norm.weight"].eq(1).all()
    assert by_name["model.layers.0.self_attn.q_proj.bias"].eq(0).all()
    assert by_name["model.layers.1.feed_forward.experts.down_proj"].std() == pytest.approx(0.02, rel=0.1)


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Save the checkpoint's tensors anew after ``change``, in one file."""
    tensors = {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}
    for file in [*directory.glob("*.safetensors"), directory / "model.safetensors.index.json"]:
        file.unlink()
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def expect_refusal(directory: Path, config: ModelConfig, message: str) -> None:
    """Both by the check of headers and by the loader, which must not have read a weight by then."""
    with pytest.raises(CheckpointError, match=message):
        verify_checkpoint(directory, config)
    model = make_model(config)
    for piece in model.slices:
        piece.destination.fill_(7.0)
    with pytest.raises(CheckpointError, match=message):
        load_weights(model, directory)
    assert all(piece.destination.eq(7.0).all() for piece in model.slices)


ROUTER = "model.layers.1.feed_forward.router.weight"


def test_missing_tensor(checkpoint: Path, config: ModelConfig) -> None:
    rewrite(checkpoint, lambda tensors: tensors.pop(ROUTER))
    expect_refusal(checkpoint, config, f"{checkpoint}.* has no tensor '{ROUTER}'")


def test_tensor_that_only_the_index_has(checkpoint: Path, config: ModelConfig) -> None:
    file = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"][ROUTER]
    tensors = load_file(checkpoint / file)
    del tensors[ROUTER]
    save_file(tensors, checkpoint / file)
    expect_refusal(checkpoint, config, f"{file} has no tensor '{ROUTER}'")


def test_wrong_shape(checkpoint: Path, config: ModelConfig) -> None:
    rewrite(checkpoint, lambda tensors: tensors.update({ROUTER: torch.zeros(3, 32)}))
    expect_refusal(checkpoint, config, rf"'{ROUTER}' has shape \[3, 32\]; config.json makes it \[4, 32\]")


def test_wrong_format(checkpoint: Path, config: ModelConfig) -> None:
    rewrite(checkpoint, lambda tensors: tensors.update({ROUTER: torch.zeros(4, 32, dtype=torch.int8)}))
    expect_refusal(checkpoint, config, f"'{ROUTER}' is in format I8; expected is F32 or F16 or BF16")


def test_missing_file(checkpoint: Path, config: ModelConfig) -> None:
    (checkpoint / "model-1.safetensors").unlink()
    expect_refusal(checkpoint, config, r"model-1.safetensors is missing \(it should hold \d+ tensors, 'model")


def test_no_checkpoint_at_all(tmp_path: Path, config: ModelConfig) -> None:
    expect_refusal(tmp_path, config, "only safetensors checkpoints are read")


def test_truncated_data(checkpoint: Path, config: ModelConfig) -> None:
    path = checkpoint / "model-2.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    expect_refusal(checkpoint, config, "model-2.safetensors is truncated: tensor '.*' ends at byte")


@pytest.mark.parametrize("size", [0, 5, 8, 60])
def test_truncated_header(checkpoint: Path, config: ModelConfig, size: int) -> None:
    os.truncate(checkpoint / "model-0.safetensors", size)
    expect_refusal(checkpoint, config, "model-0.safetensors is truncated or not a safetensors file")


@pytest.mark.parametrize(
    "header",
    [
        b"no json at all",
        b"[1, 2]",
        b'{"a": {"dtype": "F32"}}',
        b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}',
    ],
)
def test_broken_header(checkpoint: Path, config: ModelConfig, header: bytes) -> None:
    content = len(header).to_bytes(8, "little") + header + bytes(100)
    (checkpoint / "model-0.safetensors").write_bytes(content)
    expect_refusal(checkpoint, config, "model-0.safetensors")


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}']
)
def test_broken_index(checkpoint: Path, config: ModelConfig, content: str) -> None:
    (checkpoint / "model.safetensors.index.json").write_text(content)
    expect_refusal(checkpoint, config, "model.safetensors.index.json")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers(checkpoint: Path, config: ModelConfig, value: float) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[ROUTER][3, 7] = value

    rewrite(checkpoint, spoil)
    verify_checkpoint(checkpoint, config)
    with pytest.raises(CheckpointError, match=f"model.safetensors: tensor '{ROUTER}' holds NaN or infinite weights"):
        load_weights(make_model(config), checkpoint)


def test_a_file_that_shrinks_while_it_is_read(checkpoint: Path, config: ModelConfig) -> None:
    path = checkpoint / "model-1.safetensors"

    def cut(done: int, total: int) -> None:
        os.truncate(path, 100)

    with pytest.raises(CheckpointError, match=r"model-1.safetensors became shorter while tensor"):
        load_weights(make_model(config), checkpoint, on_progress=cut)


def test_other_tensors_are_ignored(checkpoint: Path, config: ModelConfig) -> None:
    rewrite(checkpoint, lambda tensors: tensors.update({"vision_model.weight": torch.full((2,), torch.nan)}))
    load_weights(make_model(config), checkpoint)


def test_nested_text_model(tmp_path: Path, config: ModelConfig) -> None:
    """As Llama4ForConditionalGeneration stores it."""
    nested = ModelConfig.from_hf({"architectures": ["Llama4ForConditionalGeneration"], "text_config": CONFIG})
    tensors = tensors_of(nested, torch.float32)
    assert all(name.startswith("language_model.") for name in tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    model = make_model(nested)
    load_weights(model, tmp_path)
    expect_slices(model, tensors)


def test_files_are_closed(checkpoint: Path, config: ModelConfig) -> None:
    before = set(os.listdir("/proc/self/fd"))
    load_weights(make_model(config), checkpoint)
    assert set(os.listdir("/proc/self/fd")) == before
    shutil.rmtree(checkpoint)
