"""Whole models from GGUF files against transformers with the weights that the gguf package decodes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from engine.config import Dtype, LoadFormat, ParallelConfig
from engine.errors import CheckpointError, LayoutError
from engine.gguf.header import read_header
from engine.model_config import ModelConfig
from engine.models.registry import build_model
from engine.parallel.mesh import Mesh
from engine.weights.ledger import shard_bytes
from engine.weights.loader import load_weights, verify_checkpoint
from tests.gguf.files import random_blocks, write_gguf
from tests.gguf.models import CASES, Reference, metadata
from tests.parity.reference import NUM_NEW
from tests.parity.test_transformers import assert_equal
from tests.support.conformance import Conforms
from tests.support.model_driver import ModelDriver, generate_alone, run_rank
from tests.support.rank_pool import run_ranks

pytestmark = pytest.mark.timeout(120)

References = Callable[[str], Reference]
LAYOUTS = [
    ("q8", 1, 1),
    ("q8", 4, 1),
    ("q4_k_m", 1, 1),
    ("q4_k_m", 2, 1),
    ("llama3.1-tied", 2, 1),
    ("biases-f16", 2, 1),
    ("mixtral", 1, 1),
    ("mixtral", 2, 2),
    ("qwen3", 2, 1),
    ("qwen3-moe", 2, 1),
]


@pytest.mark.parametrize(("name", "tp", "ep"), LAYOUTS, ids=[f"{name}-tp{tp}-ep{ep}" for name, tp, ep in LAYOUTS])
def test_logits_and_tokens_equal_transformers(
    reference: References, conforms: Conforms, name: str, tp: int, ep: int
) -> None:
    made, case = reference(name), CASES[name]
    conforms(type(case.config).__name__.removesuffix("Config"), case.weights, tp=tp, ep=ep, oracle="gguf, transformers")
    ours = run_ranks(run_rank, tp, str(made.path), tp, ep, Dtype.FLOAT32, made.prompts, NUM_NEW)[0]
    assert_equal(ours["together"], made.generated, 1e-4)
    assert_equal(ours["alone"], made.generated, 1e-4)


@pytest.mark.parametrize("name", CASES)
def test_the_configuration_is_that_of_config_json(reference: References, name: str) -> None:
    made = reference(name)
    ours, theirs = ModelConfig.from_directory(made.path), ModelConfig.from_directory(made.directory)
    assert ours.architecture == theirs.architecture
    assert ours.layers == theirs.layers
    for field in ("vocab_size", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "max_position_embeddings"):
        assert getattr(ours, field) == getattr(theirs, field)
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.attention_bias == theirs.attention_bias
    assert ours.rope.theta == theirs.rope.theta
    assert ours.rms_norm_eps == pytest.approx(theirs.rms_norm_eps, rel=1e-6)
    assert bool(ours.rope.frequency_divisors) == (theirs.rope.kind == "llama3")


def test_transformers_reads_the_same_file_alike(reference: References) -> None:
    """Names, the order of rows and the numbers, as transformers' own reader of GGUF has them."""
    made = reference("q8")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        made.path.parent, gguf_file=made.path.name, dtype=torch.float32
    )
    expected = transformers.AutoModelForCausalLM.from_pretrained(made.directory, dtype=torch.float32)
    for name, values in expected.state_dict().items():
        torch.testing.assert_close(theirs.state_dict()[name], values, rtol=0, atol=0)


def test_blocks_stay_blocks_in_memory(reference: References) -> None:
    """A rank holds what the file holds: the ledger says so before, and the parameters after loading."""
    path = reference("q4_k_m").path
    header = read_header(path)
    config = ModelConfig.from_directory(path)
    in_file = {name: t.type.num_bytes(int(np.prod(t.shape))) for name, t in header.tensors.items()}
    norms = sum(size for name, size in in_file.items() if "norm" in name)
    ledger = shard_bytes(config, ParallelConfig(), 0, Dtype.FLOAT32)
    assert ledger.total == sum(in_file.values())
    # Two ranks share all but the norms; 97 rows are 49 and 48.
    of_two = [shard_bytes(config, ParallelConfig(tp=2), rank, Dtype.FLOAT32).total for rank in (0, 1)]
    assert sum(of_two) == sum(in_file.values()) + norms
    model = build_model(config, Mesh(), Dtype.FLOAT32, torch.device("cpu"))
    assert load_weights(model, path) == ledger.total
    assert isinstance(model, torch.nn.Module)
    assert {p.dtype for name, p in model.named_parameters() if "norm" not in name} == {torch.uint8}


def test_float_files_are_quantized_while_they_load(reference: References) -> None:
    """As the same weights from safetensors are: the rows of queries and keys are in their order by then."""
    made = reference("biases-f16")
    mesh = Mesh(ParallelConfig(tp=2), 1)
    held = []
    for path in (made.path, made.directory):
        model = build_model(ModelConfig.from_directory(path, "int8"), mesh, Dtype.FLOAT32, torch.device("cpu"))
        load_weights(model, path)
        assert isinstance(model, torch.nn.Module)
        held.append(model.state_dict())
    assert {values.dtype for values in held[0].values()} >= {torch.int8}
    for name, values in held[1].items():
        assert torch.equal(held[0][name], values), name


def test_bfloat16_rounds_what_float32_computes(reference: References) -> None:
    made = reference("q4_k_m")
    config = ModelConfig.from_directory(made.path)
    assert config.dtype is Dtype.BFLOAT16
    model = build_model(config, Mesh(), Dtype.BFLOAT16, torch.device("cpu"))
    load_weights(model, made.path)
    prompt = made.prompts[1]
    ours = generate_alone(ModelDriver(model, Mesh(), torch.bfloat16), [prompt], 1)[0]
    difference = np.abs(ours.logits - made.generated[1].logits[: len(prompt)])
    assert 0 < difference.mean() < 0.05 * made.generated[1].logits.std()


def test_dummy_weights_are_finite(reference: References) -> None:
    """Random bytes, but no random scales that are infinite."""
    made = reference("q4_k_m")
    model = build_model(ModelConfig.from_directory(made.path), Mesh(), Dtype.FLOAT32, torch.device("cpu"))
    load_weights(model, made.path, LoadFormat.DUMMY)
    ours = generate_alone(ModelDriver(model, Mesh(), torch.float32), made.prompts[:1], 2)[0]
    assert np.isfinite(ours.logits).all()


def test_a_cut_through_a_block_is_a_layout_error(reference: References) -> None:
    config = ModelConfig.from_directory(reference("q4_k_m").path)
    with pytest.raises(LayoutError, match=r"layers\.0\.self_attn\.o_proj is in Q4_K.*512 inputs.*4 ranks"):
        build_model(config, Mesh(ParallelConfig(tp=4)), Dtype.FLOAT32, torch.device("meta"))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_scale_that_is_no_number_names_file_and_tensor(reference: References, tmp_path: Path, value: float) -> None:
    path = reference("q8").path
    damaged = tmp_path / "damaged.gguf"
    data = bytearray(path.read_bytes())
    tensor = read_header(path).tensors["blk.1.ffn_up.weight"]
    data[tensor.offset + 34 * 5 : tensor.offset + 34 * 5 + 2] = np.array([value], np.float16).tobytes()
    damaged.write_bytes(data)
    config = ModelConfig.from_directory(damaged)
    verify_checkpoint(damaged, config)
    model = build_model(config, Mesh(), Dtype.FLOAT32, torch.device("cpu"))
    with pytest.raises(CheckpointError, match=r"damaged\.gguf: tensor 'blk\.1\.ffn_up\.weight' holds NaN or infinite"):
        load_weights(model, damaged)


def _write(path: Path, architecture: str = "llama", changes: dict[str, object] | None = None, **tensors: str) -> Path:
    """A file with an embedding and what else is named, a ``_`` for each dot."""
    values = {**metadata(architecture, CASES["q8"].config), **(changes or {})}
    generator = np.random.default_rng(0)
    written = {"token_embd.weight": ("F32", generator.normal(size=(97, 64)))}
    for name, kind in tensors.items():
        data = random_blocks(kind, (32, 64), generator) if kind == "Q8_0" else generator.normal(size=(32, 64))
        written[name.replace("__", ".")] = (kind, data)
    write_gguf(path, architecture, {k: v for k, v in values.items() if v is not None}, written)
    return path


@pytest.mark.parametrize(
    ("architecture", "changes", "tensors", "message"),
    [
        ("llama4", {}, {}, "'llama4'.*llama, qwen3, qwen3moe are served"),
        ("llama", {"split.count": 3}, {}, "one of 3 parts.*llama-gguf-split"),
        ("llama", {"llama.block_count": None}, {}, r"llama\.block_count is missing"),
        ("llama", {"llama.attention.head_count_kv": [4, 8]}, {}, r"head_count_kv is \[4, 8\]"),
        ("llama", {"llama.rope.scaling.type": "longrope"}, {}, "'longrope', which is not served"),
        ("llama", {"llama.rope.dimension_count": 16}, {}, "rope.dimension_count 16"),
        ("llama", {}, {"blk__0__attn_sinks__weight": "F32"}, r"'blk\.0\.attn_sinks\.weight', which is not known"),
        ("llama", {}, {"rope_freqs__weight": "F32"}, "must hold 16 F32 values"),
    ],
)
def test_what_is_not_served_is_refused_by_name(
    tmp_path: Path, architecture: str, changes: dict[str, object], tensors: dict[str, str], message: str
) -> None:
    path = _write(tmp_path / "odd.gguf", architecture, changes, **tensors)
    with pytest.raises(CheckpointError, match=message) as refusal:
        ModelConfig.from_directory(path)
    assert "odd.gguf" in str(refusal.value)


def test_a_format_that_is_not_served_is_refused_by_name(tmp_path: Path) -> None:
    path = _write(tmp_path / "odd.gguf", blk__0__ffn_up__weight="Q8_0")
    data = path.read_bytes()
    at = data.index(b"blk.0.ffn_up.weight") + len("blk.0.ffn_up.weight") + 4 + 16
    path.write_bytes(data[:at] + (23).to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(CheckpointError, match=r"'blk\.0\.ffn_up\.weight' is in IQ4_XS.*Q4_K_M"):
        ModelConfig.from_directory(path)


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    path = _write(tmp_path / "short.gguf")
    config = ModelConfig.from_directory(path)
    with pytest.raises(CheckpointError, match=r"short\.gguf has no tensor for 'model\.layers\.0\."):
        verify_checkpoint(path, config)
    path = _write(tmp_path / "wrong.gguf", blk__0__attn_norm__weight="F32")
    with pytest.raises(CheckpointError, match=r"'blk\.0\.attn_norm\.weight' has shape \[32, 64\].*\[64\]"):
        verify_checkpoint(path, ModelConfig.from_directory(path))
    path = _write(tmp_path / "kind.gguf", blk__0__attn_norm__weight="Q8_0")
    with pytest.raises(CheckpointError, match=r"'blk\.0\.attn_norm\.weight' is in Q8_0; expected is F32"):
        verify_checkpoint(path, ModelConfig.from_directory(path))
