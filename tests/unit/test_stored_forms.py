"""Forms in which checkpoints are stored all load to the same: doubled key-value heads, tied heads, shards, zero sizes,
and configurations of both generations of transformers."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import engine.weights.slice_reader as slice_reader
from engine.config import Dtype, ParallelConfig
from engine.errors import CheckpointError
from engine.model_config import ModelConfig
from engine.models.registry import Model, build_model
from engine.parallel.mesh import Mesh
from engine.weights.checkpoint import Checkpoint
from engine.weights.loader import load_weights, verify_checkpoint

Tensors = dict[str, torch.Tensor]

HEAD_DIM, NUM_KV_HEADS = 8, 2
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 48,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": NUM_KV_HEADS,
    "head_dim": HEAD_DIM,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "attention_bias": True,
    "dtype": "float32",
}
FBGEMM = CONFIG | {
    "attention_bias": False,
    "quantization_config": {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def random_tensors(config: ModelConfig) -> Tensors:
    """One for every name that the model reads, in its own format."""
    generator = torch.Generator().manual_seed(0)
    tensors: Tensors = {}
    model = build_model(config, Mesh(), Dtype.FLOAT32, torch.device("meta"))
    for piece in model.slices:
        values = torch.rand(piece.shape, generator=generator) + 0.5
        tensors.setdefault(piece.name, values.to(piece.destination.dtype))
    for conversion in model.conversions:
        for source in conversion.sources:
            tensors.setdefault(source.name, torch.randn(source.shape, generator=generator))
    return tensors


def loaded(config: ModelConfig, directory: Path, tp: int = 1, rank: int = 0) -> Model:
    mesh = Mesh(ParallelConfig(tp=tp), rank)
    model = build_model(config, mesh, Dtype.FLOAT32, torch.device("cpu"))
    load_weights(model, directory)
    return model


def expect_equal(one: Model, other: Model) -> None:
    assert isinstance(one, torch.nn.Module)
    assert isinstance(other, torch.nn.Module)
    for (name, values), expected in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8)), name


def double_heads(tensors: Tensors) -> Tensors:
    """Each key-value head twice; the odd ones spoilt, so that reading one shows."""
    doubled: Tensors = {}
    for name, values in tensors.items():
        doubled[name] = values
        if ".k_proj." in name or ".v_proj." in name:
            heads = values.unflatten(0, (NUM_KV_HEADS, HEAD_DIM)).repeat_interleave(2, 0).clone()
            heads[1::2] = 7
            doubled[name] = heads.flatten(0, 1)
            assert doubled[name].shape[0] == 2 * values.shape[0]
    return doubled


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("form", ["float", "fbgemm", "int8 while loading"])
@pytest.mark.parametrize("min_run_bytes", [0, 4096])
def test_doubled_heads_load_as_single_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tp: int, form: str, min_run_bytes: int
) -> None:
    """tp=4 is more than there are key-value heads."""
    monkeypatch.setattr(slice_reader, "_MIN_RUN_BYTES", min_run_bytes)
    hub_config = FBGEMM if form == "fbgemm" else CONFIG
    for name in ("single", "doubled"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(hub_config))
    config = ModelConfig.from_directory(tmp_path / "single", "int8" if form.startswith("int8") else None)
    tensors = random_tensors(config)
    save_file(tensors, tmp_path / "single" / "model.safetensors")
    save_file(double_heads(tensors), tmp_path / "doubled" / "model.safetensors")
    if form == "fbgemm":
        assert tensors["model.layers.0.self_attn.k_proj.weight"].dtype == torch.float8_e4m3fn
    for rank in range(tp):
        expect_equal(loaded(config, tmp_path / "doubled", tp, rank), loaded(config, tmp_path / "single", tp, rank))


def test_doubled_heads_are_read_by_offset_with_one_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(slice_reader, "_MIN_RUN_BYTES", 0)
    config = ModelConfig.from_hf(CONFIG)
    save_file(double_heads(random_tensors(config)), tmp_path / "model.safetensors")
    num_read = 0
    preadv = os.preadv

    def counting(descriptor: int, buffers: Any, offset: int) -> int:
        nonlocal num_read
        num_read += (count := preadv(descriptor, buffers, offset))
        return count

    monkeypatch.setattr(os, "preadv", counting)
    with caplog.at_level(logging.WARNING):
        model = loaded(config, tmp_path, tp=2, rank=1)
    assert num_read == sum(piece.num_bytes for piece in model.slices)
    assert [record.message for record in caplog.records] == [
        f"{tmp_path} stores every key-value head twice; one of each pair is read"
    ]


@pytest.mark.parametrize("name", ["q_proj", "o_proj"])
def test_only_key_value_heads_may_be_doubled(tmp_path: Path, name: str) -> None:
    config = ModelConfig.from_hf(CONFIG)
    tensors = random_tensors(config)
    full_name = f"model.layers.1.self_attn.{name}.weight"
    tensors[full_name] = tensors[full_name].repeat(2, 1)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"'{full_name}' has shape \[128, 64\]; config.json makes it \[64, 64\]"):
        verify_checkpoint(tmp_path, config)


@pytest.mark.parametrize("stored", [(EMBEDDING,), (HEAD,), (EMBEDDING, HEAD)])
def test_tied_embeddings_under_either_name(tmp_path: Path, stored: tuple[str, ...]) -> None:
    """Where both are stored, transformers takes the embedding; so here it is the one that counts."""
    config = ModelConfig.from_hf(CONFIG | {"tie_word_embeddings": True})
    tensors = random_tensors(config)
    assert HEAD not in tensors
    embedding = tensors.pop(EMBEDDING)
    written = tensors | {name: embedding.clone() for name in stored}
    if len(stored) == 2:
        written[HEAD].zero_()
    save_file(written, tmp_path / "model.safetensors")
    verify_checkpoint(tmp_path, config)
    model = loaded(config, tmp_path)
    (piece,) = (piece for piece in model.slices if piece.name == EMBEDDING)
    assert torch.equal(piece.destination, embedding)


def test_an_untied_model_needs_both(tmp_path: Path) -> None:
    config = ModelConfig.from_hf(CONFIG)
    for name in (EMBEDDING, HEAD):
        tensors = random_tensors(config)
        del tensors[name]
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=f"has no tensor '{name}'"):
            verify_checkpoint(tmp_path, config)


def write_shards(directory: Path, shards: dict[str, Tensors], weight_map: dict[str, str]) -> None:
    for file, tensors in shards.items():
        save_file(tensors, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_of_a_tensor_in_two_shards_the_indexs_counts(tmp_path: Path) -> None:
    one, two = torch.zeros(3), torch.ones(3)
    shards = {"a.safetensors": {"x": one, "y": one.clone()}, "b.safetensors": {"x": two, "z": two.clone()}}
    for file, expected in (("a.safetensors", one), ("b.safetensors", two)):
        write_shards(tmp_path, shards, {"x": file, "y": "a.safetensors", "z": "b.safetensors"})
        entry = Checkpoint(tmp_path).entry("x", (3,))
        assert entry.file == tmp_path / file
        assert torch.equal(load_file(entry.file)["x"], expected)


def test_a_tensor_in_two_shards_that_the_index_leaves_open_is_refused(tmp_path: Path) -> None:
    shards = {file: {"x": torch.ones(3), file[0]: torch.ones(3)} for file in ("a.safetensors", "b.safetensors")}
    write_shards(tmp_path, shards, {"a": "a.safetensors", "b": "b.safetensors"})
    with pytest.raises(CheckpointError, match=r"b.safetensors: tensor 'x' stands in .*a.safetensors too"):
        Checkpoint(tmp_path)


def test_tensors_without_elements_do_not_disturb(tmp_path: Path) -> None:
    config = ModelConfig.from_hf(CONFIG)
    tensors = random_tensors(config)
    empty = {"model.aaa": torch.empty(0), "model.layers.0.empty": torch.empty(0, 5), "zzz": torch.empty(3, 0)}
    save_file(tensors | empty, tmp_path / "model.safetensors")
    model = loaded(config, tmp_path)
    for piece in model.slices:
        assert torch.equal(piece.destination, tensors[piece.name])


V4_ONLY = ("rope_theta", "rope_scaling", "torch_dtype")


@pytest.mark.parametrize("generation", [4, 5])
def test_what_transformers_saved_in_shards(tmp_path: Path, generation: int) -> None:
    """Sharded by transformers itself. The hub's older configurations differ as its v4 wrote them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    fields = {key: value for key, value in CONFIG.items() if key not in ("architectures", "dtype", "attention_bias")}
    torch.manual_seed(0)
    original = LlamaForCausalLM(LlamaConfig(**fields, rope_parameters=rope))
    original.save_pretrained(tmp_path, max_shard_size="40KB")
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    assert not set(V4_ONLY) & set(saved)
    expected = ModelConfig.from_hf(saved)
    if generation == 4:
        theta = saved["rope_parameters"].pop("rope_theta")
        saved |= {"rope_theta": theta, "rope_scaling": saved.pop("rope_parameters"), "torch_dtype": saved.pop("dtype")}
        path.write_text(json.dumps(saved))
    config = ModelConfig.from_directory(tmp_path)
    assert config == expected
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    state = original.state_dict()
    for rank in range(2):
        for piece in loaded(config, tmp_path, tp=2, rank=rank).slices:
            area = tuple(slice(s, s + n) for s, n in zip(piece.start, piece.destination.shape, strict=True))
            assert torch.equal(piece.destination, state[piece.name][area]), piece.name
