"""AutoAWQ's int4, against its description in numpy."""

from pathlib import Path

import pytest
import torch

from engine.config import Dtype, ParallelConfig
from engine.errors import CheckpointError, LayoutError
from engine.model_config import ModelConfig
from engine.parameter import Split
from engine.quantization.matrix import MatrixPart
from engine.quantization_config import parse_quantization
from engine.weights.ledger import shard_bytes
from engine.weights.loader import verify_checkpoint
from tests.quantization.comparison import SLICES, assert_matrix_equals, assert_same_answers, load_matrix, part_of
from tests.quantization.conftest import Answers, Quantized
from tests.quantization.four_bit_checkpoints import FORMATS, INT4_EXPERTS, change_tensors
from tests.support.conformance import Conforms

AWQ = FORMATS["int4-awq"]
QKV = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
DOWN = ["model.layers.1.mlp.down_proj"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "inputs"), SLICES)
def test_rows_are_as_described(quantized: Quantized, outputs: Split, inputs: Split, dtype: torch.dtype) -> None:
    """Exact in float32, which the float16 scales allow, and rounded once in the others."""
    made = quantized(AWQ, "llama")
    assert_matrix_equals(made.directory, DOWN if inputs.degree > 1 else QKV, made.values, outputs, inputs, dtype)


@pytest.mark.parametrize("tp", [1, 2])
def test_llama(quantized: Quantized, answers: Answers, conforms: Conforms, tp: int) -> None:
    conforms("Llama", AWQ.name, tp=tp, oracle="format's description")
    assert_same_answers(answers(FORMATS, "llama", tp, 1)[AWQ.name], quantized(AWQ, "llama").expected)


@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (2, 2)])
def test_mixtral(quantized: Quantized, answers: Answers, conforms: Conforms, tp: int, ep: int) -> None:
    conforms("Mixtral", AWQ.name, tp=tp, ep=ep, oracle="format's description")
    assert_same_answers(answers(INT4_EXPERTS, "mixtral", tp, ep)[AWQ.name], quantized(AWQ, "mixtral").expected)


def test_what_a_rank_holds(quantized: Quantized) -> None:
    """4 bits a weight, and for 64 inputs a scale of 2 bytes and a zero point of 1: 0.59 of an int8's bytes."""
    made = quantized(AWQ, "llama")
    config = ModelConfig.from_directory(made.directory)
    held = shard_bytes(config, ParallelConfig(tp=2), 0, Dtype.BFLOAT16).by_kind
    num_weights = sum(value.numel() for name, value in made.values.items() if ".mlp." in name)
    assert held["feed_forward"] == num_weights / 2 * (0.5 + 3 / 64)


@pytest.mark.parametrize(
    ("outputs", "inputs", "message"),
    [
        (Split(), Split(8, 1), "q_proj cannot be divided over 8 ranks: 32 of 256 each would cut groups of 64 inputs; "
         "over 4 it can"),
        (Split(64, 1), Split(), "q_proj cannot be divided over 64 ranks: 4 of 256 each would cut words of 8 outputs; "
         "over 32 it can"),
    ],
)  # fmt: skip
def test_a_layout_that_cuts_is_refused(quantized: Quantized, outputs: Split, inputs: Split, message: str) -> None:
    made = quantized(AWQ, "llama")
    with pytest.raises(LayoutError, match=message):
        load_matrix(made.directory, [part_of(QKV[0], made.values, outputs, inputs)])


def test_matrices_that_the_format_cannot_hold_are_refused(quantized: Quantized) -> None:
    with pytest.raises(CheckpointError, match="up_proj: 100 is no multiple of 64 as groups of 64 inputs need"):
        load_matrix(quantized(AWQ, "llama").directory, [MatrixPart("up_proj", 64, 100)])


def test_a_wrong_tensor_is_refused(quantized: Quantized, tmp_path: Path) -> None:
    directory = quantized(AWQ, "llama").directory
    for change, message in (
        (
            {f"{QKV[0]}.qweight": torch.zeros(32, 256, dtype=torch.int32)},
            r"\[32, 256\]; config.json makes it \[256, 32\]",
        ),
        ({f"{QKV[0]}.qzeros": None}, "has no tensor 'model.layers.0.self_attn.q_proj.qzeros'"),
        ({f"{QKV[0]}.scales": torch.zeros(4, 256, dtype=torch.int32)}, "in format I32; expected is F32 or F16 or BF16"),
    ):
        change_tensors(directory, tmp_path, change)
        with pytest.raises(CheckpointError, match=message):
            verify_checkpoint(tmp_path, ModelConfig.from_directory(tmp_path))


@pytest.mark.parametrize(
    ("config", "message"),
    [({"bits": 8}, "AWQ with 8 bits"), ({"bits": 4, "version": "gemv"}, "in version gemv is not served; .* gemm is")],
)
def test_other_versions_are_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_quantization({"quant_method": "awq", **config})


def test_groups_of_a_whole_row() -> None:
    config = parse_quantization({"quant_method": "awq", "bits": 4, "group_size": -1, "version": None})
    form = config.format_of("model.layers.0.mlp.down_proj")
    assert form is not None
    assert form.group_size == 0
