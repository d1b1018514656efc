"""GPTQ's int4, against its description in numpy: both forms of zero points, inputs in order and not."""

from pathlib import Path

import pytest
import torch

from engine.config import Dtype, LoadFormat
from engine.errors import CheckpointError, LayoutError
from engine.model_config import ModelConfig
from engine.models.registry import build_model
from engine.parallel.mesh import Mesh
from engine.parameter import Split
from engine.quantization_config import parse_quantization
from engine.weights.loader import load_weights
from tests.quantization.comparison import SLICES, assert_matrix_equals, assert_same_answers, load_matrix, part_of
from tests.quantization.conftest import Answers, Quantized
from tests.quantization.four_bit_checkpoints import FORMATS, INT4_EXPERTS, change_tensors
from tests.support.conformance import Conforms

KINDS = ["int4-gptq", "int4-gptq-v2", "int4-gptq-desc-act"]
QKV = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
DOWN = ["model.layers.1.mlp.down_proj"]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("outputs", "inputs"), SLICES)
def test_rows_are_as_described(quantized: Quantized, name: str, outputs: Split, inputs: Split) -> None:
    """Zero points of 0 included, which the first form stores by borrowing from their neighbours."""
    made = quantized(FORMATS[name], "llama")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert_matrix_equals(made.directory, DOWN if inputs.degree > 1 else QKV, made.values, outputs, inputs, dtype)


@pytest.mark.parametrize("name", KINDS)
def test_llama(quantized: Quantized, answers: Answers, conforms: Conforms, name: str) -> None:
    conforms("Llama", name, tp=2, oracle="format's description")
    assert_same_answers(answers(FORMATS, "llama", 2, 1)[name], quantized(FORMATS[name], "llama").expected)


@pytest.mark.parametrize(("name", "tp", "ep"), [("int4-gptq", 2, 2), ("int4-gptq-desc-act", 2, 2), (KINDS[2], 1, 1)])
def test_mixtral(quantized: Quantized, answers: Answers, conforms: Conforms, name: str, tp: int, ep: int) -> None:
    conforms("Mixtral", name, tp=tp, ep=ep, oracle="format's description")
    given = answers(INT4_EXPERTS, "mixtral", tp, ep)[name]
    assert_same_answers(given, quantized(FORMATS[name], "mixtral").expected)


def test_reordered_inputs_may_be_cut_anywhere(quantized: Quantized) -> None:
    """A rank keeps the scales of every group, so 32 inputs of groups of 64 are exact."""
    made = quantized(FORMATS["int4-gptq-desc-act"], "llama")
    assert_matrix_equals(made.directory, QKV[:1], made.values, Split(), Split(8, 5), torch.float32)


def test_a_layout_that_cuts_is_refused(quantized: Quantized) -> None:
    for name, split, message in (
        ("int4-gptq", Split(8, 1), "over 8 ranks: 32 of 256 each would cut groups of 64 inputs; over 4 it can"),
        ("int4-gptq-v2", Split(64, 1), "over 64 ranks: 4 of 256 each would cut words of 8 inputs; over 32 it can"),
    ):
        made = quantized(FORMATS[name], "llama")
        with pytest.raises(LayoutError, match=f"q_proj cannot be divided {message}"):
            load_matrix(made.directory, [part_of(QKV[0], made.values, Split(), split)])
        with pytest.raises(LayoutError, match="over 64 ranks: 4 of 256 each would cut words of 8 outputs"):
            load_matrix(made.directory, [part_of(QKV[0], made.values, Split(64, 1), Split())])


@pytest.mark.parametrize("wrong", [4, -1])
def test_a_group_that_does_not_exist_is_refused(quantized: Quantized, tmp_path: Path, wrong: int) -> None:
    made = quantized(FORMATS["int4-gptq-desc-act"], "llama")
    groups = torch.zeros(256, dtype=torch.int32)
    groups[17] = wrong
    change_tensors(made.directory, tmp_path, {f"{QKV[0]}.g_idx": groups})
    with pytest.raises(
        CheckpointError, match=rf"q_proj: its inputs belong to groups .*{wrong}.*; there are groups 0 to 3"
    ):
        load_matrix(tmp_path, [part_of(QKV[0], made.values, Split(), Split())])


def test_dummy_weights(quantized: Quantized, tmp_path: Path) -> None:
    """Random weights of this format can be computed with: each input has a group that exists."""
    config = ModelConfig.from_directory(quantized(FORMATS["int4-gptq-desc-act"], "llama").directory)
    model = build_model(config, Mesh(), Dtype.FLOAT32, torch.device("cpu"))
    load_weights(model, tmp_path, LoadFormat.DUMMY)
    orders = [tensor for conversion in model.conversions for tensor in conversion.destinations]
    assert any(tensor.dtype == torch.int32 for tensor in orders)
    assert all(int(tensor.max()) == 0 for tensor in orders if tensor.dtype == torch.int32)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bits": 8}, "GPTQ with 8 bits"),
        ({"bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format marlin is not served; gptq and gptq_v2 are"),
        ({"bits": 4, "dynamic": {"+:.*down.*": {"bits": 8}}}, r"rules of its own for .*down.*; only exclusions"),
    ],
)
def test_other_forms_are_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_quantization({"quant_method": "gptq", **config})


def test_modules_left_alone() -> None:
    """Excluded by GPTQModel's expressions, or not among those that AutoGPTQ lists."""
    for entry in (
        {"dynamic": {"-:.*\\.o_proj": {}}},
        {"modules_in_block_to_quantize": [["self_attn.q_proj", "self_attn.k_proj"], ["mlp.down_proj"]]},
    ):
        config = parse_quantization({"quant_method": "gptq", "bits": 4, **entry})
        assert config.format_of("model.layers.0.self_attn.o_proj") is None
        assert config.format_of("model.layers.0.self_attn.q_proj") is not None
        assert config.format_of("model.layers.0.mlp.down_proj") is not None
