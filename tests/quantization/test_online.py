"""``--quantization``: float checkpoints that are quantized while they are loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cluster.config import EMBEDDED_MODEL, load_serve_config
from cluster.control.preflight import preflight
from engine.config import Dtype, LoadFormat, ParallelConfig
from engine.errors import InvalidOption
from engine.model_config import ModelConfig
from engine.models.registry import build_model
from engine.parallel.mesh import Mesh
from engine.parameter import Split
from engine.quantization.fp8 import Float8Matrix
from engine.quantization.int8 import SignedByteMatrix
from engine.quantization.matrix import TILE_BYTES, FloatSource, MatrixPart
from engine.quantization.row_scaled import RowScaledMatrix
from engine.weights.ledger import shard_bytes
from engine.weights.loader import load_weights
from tests.quantization.checkpoints import FORMATS, matrices, others, write_float
from tests.quantization.comparison import assert_same_answers, cut, load_matrix, part_of, run_gang
from tests.quantization.conftest import Quantized
from tests.support.conformance import Conforms
from tests.support.model_driver import ModelDriver, generate_alone
from tests.support.served import Served, run_remuda

QKV = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
BITS_8 = ["int8", "fp8"]


def quantize_like_a_library(name: str, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of float32 ``rows``: bitsandbytes' for int8, compressed-tensors' for fp8."""
    if name == "int8":
        from bitsandbytes import functional

        codes, maxima, _ = functional.int8_vectorwise_quant(rows)
        return codes, maxima[:, None] / 127
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(num_bits=8, type="float", strategy="channel")
    scale, zero_point = calculate_qparams(rows.amin(1, keepdim=True), rows.amax(1, keepdim=True), args)
    return quantize(rows, scale, zero_point, args, torch.float8_e4m3fn), scale


@pytest.mark.parametrize("name", BITS_8)
@pytest.mark.parametrize(("outputs", "inputs"), [(Split(2, 1), Split()), (Split(), Split(2, 1))])
def test_codes_and_scales_are_a_librarys(
    float_dir: Callable[[str], Path], name: str, outputs: Split, inputs: Split
) -> None:
    """Each rank quantizes its own slice; where it has only some columns, a row's scale is theirs."""
    values = matrices(float_dir("llama"))
    parts = [part_of(part, values, outputs, inputs) for part in QKV]
    matrix = load_matrix(float_dir("llama"), parts, quantization=name)
    assert isinstance(matrix, SignedByteMatrix if name == "int8" else Float8Matrix)
    rows = torch.cat([cut(values[part], outputs, inputs) for part in QKV])
    codes, scales = quantize_like_a_library(name, rows)
    assert torch.equal(matrix.codes.float(), codes.float())
    assert torch.equal(matrix.scales, scales)
    largest = rows.abs().amax(1, keepdim=True)
    assert ((matrix.rows(slice(None)) - rows).abs() <= largest * (0.5 / 127 if name == "int8" else 2**-4)).all()


@pytest.mark.parametrize("name", BITS_8)
def test_fused_experts(float_dir: Callable[[str], Path], name: str) -> None:
    """From one tensor of all experts, stored transposed, as from matrices by themselves."""
    values = matrices(float_dir("moe"))
    experts, split = "model.layers.1.feed_forward.experts", Split(2, 1)
    fused = (4, 256, 2 * 256)
    parts = [
        MatrixPart("2.gate_proj", 256, 256, split, fused=FloatSource("gate_up_proj", fused, (2, 0, 128))),
        MatrixPart("2.up_proj", 256, 256, split, fused=FloatSource("gate_up_proj", fused, (2, 0, 256 + 128))),
    ]
    matrix = load_matrix(float_dir("moe"), parts, quantization=name, prefix=f"{experts}.")
    assert isinstance(matrix, RowScaledMatrix)
    rows = torch.cat([values[f"{experts}.2.{part}_proj"][128:] for part in ("gate", "up")])
    codes, scales = quantize_like_a_library(name, rows)
    assert torch.equal(matrix.codes.float(), codes.float())
    assert torch.equal(matrix.scales, scales)


@pytest.mark.parametrize(("name", "kind", "tp", "ep"), [("int8", "moe", 2, 1), ("fp8", "llama", 2, 1)])
def test_models(
    float_dir: Callable[[str], Path], tmp_path: Path, conforms: Conforms, name: str, kind: str, tp: int, ep: int
) -> None:
    """Against our float model with the weights that a library quantized and gave back, slice by slice."""
    conforms(
        {"llama": "Llama", "moe": "Llama 4"}[kind],
        f"--quantization {name}",
        tp=tp,
        ep=ep,
        oracle={"int8": "bitsandbytes", "fp8": "compressed-tensors"}[name],
    )
    rounded = {}
    values = matrices(float_dir(kind))
    if name == "int8":
        values["lm_head"] = others(float_dir(kind))["lm_head.weight"]
    for module, value in values.items():
        num_slices = tp if module.endswith(("o_proj", "down_proj")) else 1
        slices = [quantize_like_a_library(name, part) for part in value.chunk(num_slices, dim=1)]
        rounded[module] = torch.cat([codes.float() * scales for codes, scales in slices], dim=1)
    write_float(float_dir(kind), tmp_path, rounded)
    (expected,) = run_gang([tmp_path], tp=1, ep=1)
    (ours,) = run_gang([float_dir(kind)], tp, ep, quantization=name)
    assert_same_answers(ours, expected)


def test_rows_of_zeros(float_dir: Callable[[str], Path], tmp_path: Path) -> None:
    values = matrices(float_dir("llama"))
    values[QKV[0]] = values[QKV[0]].clone()
    values[QKV[0]][3] = 0
    write_float(float_dir("llama"), tmp_path, values)
    for name in BITS_8:
        matrix = load_matrix(tmp_path, [MatrixPart(QKV[0], 256, 256)], quantization=name)
        assert matrix.rows(slice(3, 4)).abs().max() == 0
        assert matrix.rows(slice(None)).isfinite().all()


class _LargestTensor(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that any operation gave."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and not tensor._is_view():
                self.num_bytes = max(self.num_bytes, tensor.numel() * tensor.element_size())
        return result


@pytest.mark.parametrize("name", [*BITS_8, "int4"])
def test_memory_while_quantizing_is_one_slice_and_a_tile(name: str) -> None:
    """Of a matrix of 64 MiB in float32, read as 32 MiB of bfloat16."""
    text = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 64,
        "hidden_size": 2048,
        "num_hidden_layers": 1,
        "num_attention_heads": 16,
        "intermediate_size": 8192,
        "max_position_embeddings": 64,
    }
    config = ModelConfig.from_hf(text).quantized(name)
    model = build_model(config, Mesh(ParallelConfig(tp=2), 1), Dtype.BFLOAT16, torch.device("cpu"))
    conversions = [made for made in model.conversions if "gate_proj" in made.sources[0].name]
    (conversion,) = conversions
    (source,) = conversion.sources
    assert source.size == (4096, 2048), "this rank's slice, no more"
    values = torch.randn(source.size).bfloat16()
    with _LargestTensor() as largest:
        conversion.convert(values)
    assert 0 < largest.num_bytes <= TILE_BYTES


@pytest.mark.parametrize("name", [*BITS_8, "int4"])
def test_the_ledger_shows_what_is_saved(float_dir: Callable[[str], Path], name: str) -> None:
    config = ModelConfig.from_directory(float_dir("moe"), name)
    before = shard_bytes(ModelConfig.from_directory(float_dir("moe")), ParallelConfig(tp=2), 0, Dtype.BFLOAT16)
    after = shard_bytes(config, ParallelConfig(tp=2), 0, Dtype.BFLOAT16)
    share = after.by_kind["experts"] / before.by_kind["experts"]
    assert (0.25 < share < 0.32) if name == "int4" else (0.5 < share < 0.52)
    assert after.by_kind["embedding"] == before.by_kind["embedding"]


@pytest.mark.parametrize("name", [*BITS_8, "int4"])
def test_random_weights_for_sizing(float_dir: Callable[[str], Path], name: str) -> None:
    """``--load-format dummy``: a model that computes numbers, in the bytes that the ledger names."""
    config = ModelConfig.from_directory(float_dir("moe"), name)
    model = build_model(config, Mesh(), Dtype.BFLOAT16, torch.device("cpu"))
    num_bytes = load_weights(model, float_dir("moe"), LoadFormat.DUMMY)
    assert num_bytes == shard_bytes(config, ParallelConfig(), 0, Dtype.BFLOAT16).total
    (generated,) = generate_alone(ModelDriver(model, Mesh(), torch.bfloat16), [[3, 1, 4]], 2)
    assert np.isfinite(generated.logits).all()
    assert generated.logits.std() > 0


def test_a_quantized_checkpoint_is_refused(quantized: Quantized) -> None:
    directory = quantized(FORMATS["fp8-channel"], "llama").directory
    result = run_remuda("serve", str(directory), "--quantization", "int8", "--device", "cpu")
    assert result.returncode == 2
    assert result.stderr.strip().count("\n") == 0
    assert "--quantization int8: the checkpoint is quantized already, as fp8 (compressed-tensors)" in result.stderr


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(InvalidOption, match="--quantization int3 is not known; use fp8, int4, int8"):
        preflight(load_serve_config({"quantization": "int3", "device": "cpu"}))
    plan = preflight(load_serve_config({"quantization": "int8", "device": "cpu"})).launch.replica
    assert plan.quantization == "int8"


@pytest.mark.full
@pytest.mark.timeout(200)
def test_served_on_two_ranks(tmp_path: Path) -> None:
    """The embedded model answers in int8, and the banner names the format."""
    arguments = (EMBEDDED_MODEL, "--quantization", "int8", "--tp", "2", "--device", "cpu")
    with Served(arguments, tmp_path / "log") as served:
        body = {"model": EMBEDDED_MODEL, "messages": [{"role": "user", "content": "Hello"}], "temperature": 0}
        reply = httpx.post(f"{served.url}/v1/chat/completions", json=body | {"max_tokens": 12}, timeout=60)
        assert reply.status_code == httpx.codes.OK, reply.text
        assert reply.json()["choices"][0]["message"]["content"].strip()
        assert "weights in int8 (quantized while loading)" in " ".join(served.log.read_text().split())
        assert served.stop() == 0
