"""bitsandbytes' NF4, against its own dequantization."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

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
from tests.quantization.four_bit_checkpoints import FORMATS, change_tensors
from tests.support.conformance import Conforms

KINDS = ["nf4", "nf4-single"]
QKV = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
DOWN = ["model.layers.1.mlp.down_proj"]
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 384,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
STATE = f"{QKV[0]}.weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("outputs", "inputs"), [*SLICES, (Split(), Split(8, 5))])
def test_rows_are_the_librarys(quantized: Quantized, name: str, outputs: Split, inputs: Split) -> None:
    """Bit for bit in float32, and rounded once in the others."""
    made = quantized(FORMATS[name], "llama")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert_matrix_equals(made.directory, DOWN if inputs.degree > 1 else QKV, made.values, outputs, inputs, dtype)


@pytest.mark.parametrize(("outputs", "inputs"), SLICES)
def test_nested_blocks_that_begin_within_a_row(tmp_path: Path, outputs: Split, inputs: Split) -> None:
    """256 scales share one of their own: 42⅔ rows of 384 inputs."""
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(
        torch.randn(256, 384) * torch.rand(256, 1), quant_type="nf4", compress_statistics=True
    )
    tensors = {f"m.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    save_file(tensors | {"m.weight": packed}, tmp_path / "model.safetensors")
    scheme = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = LLAMA | {"quantization_config": scheme | {"bnb_4bit_use_double_quant": True}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    values = {"m": functional.dequantize_4bit(packed, state)}
    assert_matrix_equals(tmp_path, ["m"], values, outputs, inputs, torch.float32)


@pytest.mark.parametrize(("name", "tp"), [("nf4", 2), ("nf4", 1), ("nf4-single", 2)])
def test_llama(quantized: Quantized, answers: Answers, conforms: Conforms, name: str, tp: int) -> None:
    conforms("Llama", name, tp=tp, oracle="bitsandbytes")
    assert_same_answers(answers(FORMATS, "llama", tp, 1)[name], quantized(FORMATS[name], "llama").expected)


def test_what_a_rank_holds(quantized: Quantized) -> None:
    """4.5 bits a weight; what is not quantized, such as the head, stays float."""
    made = quantized(FORMATS["nf4"], "llama")
    held = shard_bytes(ModelConfig.from_directory(made.directory), ParallelConfig(), 0, Dtype.BFLOAT16).by_kind
    num_weights = sum(value.numel() for name, value in made.values.items() if ".mlp." in name)
    table_bytes = 2 * 2 * 256 * 8
    assert held["feed_forward"] == num_weights * 4.5 / 8 + table_bytes
    assert held["head"] >= 97 * 256 * 2


def test_a_layout_that_cuts_a_block_is_refused(quantized: Quantized) -> None:
    made = quantized(FORMATS["nf4"], "llama")
    with pytest.raises(LayoutError, match="over 8 ranks: 32 of 256 each would cut blocks of 64 inputs; over 4 it can"):
        load_matrix(made.directory, [part_of(QKV[0], made.values, Split(), Split(8, 1))])
    with pytest.raises(CheckpointError, match="up_proj: 96 is no multiple of 64 as blocks of 64 inputs need"):
        load_matrix(made.directory, [MatrixPart("up_proj", 64, 96)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocksize": 128}, "q_proj: its quant_state says .*'blocksize': 128.*; served is .*'blocksize': 64"),
        ({"shape": [128, 512]}, r"q_proj: its quant_state says .*\[128, 512\]"),
        ({"nested_blocksize": 128}, "q_proj: its quant_state says .*'nested_blocksize': 128"),
        ({"nested_offset": "many"}, "q_proj: its quant_state cannot be read: ValueError"),
        ({"nested_offset": float("nan")}, "q_proj: its quant_state says"),
        ({"nested_offset": None}, "q_proj: its quant_state cannot be read: TypeError"),
        (None, "q_proj: its quant_state cannot be read: JSONDecodeError"),
    ],
)
def test_another_quant_state_is_refused(
    quantized: Quantized, tmp_path: Path, change: dict[str, object] | None, message: str
) -> None:
    made = quantized(FORMATS["nf4"], "llama")
    state = json.loads(bytes(load_file(made.directory / "model.safetensors")[STATE].tolist()))
    content = b"{" if change is None else json.dumps(state | change).encode()
    change_tensors(made.directory, tmp_path, {STATE: torch.tensor(list(content), dtype=torch.uint8)})
    with pytest.raises(CheckpointError, match=message):
        load_matrix(tmp_path, [part_of(QKV[0], made.values, Split(), Split())])


def test_another_quant_map_is_refused(quantized: Quantized, tmp_path: Path) -> None:
    made = quantized(FORMATS["nf4"], "llama")
    change_tensors(made.directory, tmp_path, {f"{QKV[0]}.weight.quant_map": torch.linspace(-1, 1, 16)})
    with pytest.raises(CheckpointError, match="q_proj: its quant_map is not that of NF4"):
        load_matrix(tmp_path, [part_of(QKV[0], made.values, Split(), Split())])


def test_a_wrong_tensor_is_refused(quantized: Quantized, tmp_path: Path) -> None:
    directory = quantized(FORMATS["nf4"], "llama").directory
    for change, message in (
        ({STATE: torch.zeros(5000, dtype=torch.uint8)}, r"shape \[5000\]"),
        ({STATE: torch.zeros(2, 30, dtype=torch.uint8)}, r"shape \[2, 30\]"),
        (
            {f"{QKV[0]}.weight": torch.zeros(100, 1, dtype=torch.uint8)},
            r"\[100, 1\]; config.json makes it \[256, 128\]",
        ),
        ({f"{QKV[0]}.weight.absmax": torch.ones(1024)}, "absmax' is in format F32; expected is U8"),
        ({f"{QKV[0]}.weight": torch.zeros(256, 256)}, r"q_proj.weight' has shape \[256, 256\]"),
    ):
        change_tensors(directory, tmp_path, change)
        with pytest.raises(CheckpointError, match=message):
            verify_checkpoint(tmp_path, ModelConfig.from_directory(tmp_path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bnb_4bit_quant_type": "fp4"}, "4-bit type fp4 is not served; nf4 is"),
        ({"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"}, "stored as bfloat16 are not served"),
    ],
)
def test_other_forms_are_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_quantization({"quant_method": "bitsandbytes", "load_in_4bit": True, **config})
