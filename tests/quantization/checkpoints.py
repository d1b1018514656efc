"""Tiny checkpoints in every quantized format, each written by the format's own library in its true layout.

``FORMATS`` of this module are those of 8 bits; other modules of this package register theirs in dictionaries of the
same kind. Matrices are known by their names in a quantized checkpoint, where each expert has matrices of its own.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.parity.architectures import randomize

Tensors = dict[str, torch.Tensor]

UNQUANTIZED = ["lm_head", "re:.*router"]
"""compressed-tensors' ``ignore`` of the checkpoints made here."""

_SIZES = {
    "vocab_size": 97,
    "hidden_size": 256,
    "head_dim": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "pad_token_id": None,
}
_MATRIX = re.compile(r"(.*\.(?:[a-z]+_proj|w[123]))\.weight")
_FUSED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")


@dataclass(frozen=True)
class Format:
    """One way to quantize. ``name``: as in the table of conformance.

    ``quantize(float_dir, out_dir)``: write the checkpoint that ``float_dir`` becomes. ``dequantized(float_dir)``: what
    the format's library says the matrices then are, [out, in] by name without ``.weight``.
    """

    name: str
    quantize: Callable[[Path, Path], None]
    dequantized: Callable[[Path], Tensors]


def make_float_llama(directory: Path) -> None:
    """A dense float32 checkpoint of two layers. Every matrix can be cut in two at multiples of 128."""
    config = transformers.LlamaConfig(**_SIZES, num_hidden_layers=2, intermediate_size=512)
    _save(transformers.LlamaForCausalLM, config, directory, seed=11)


def make_float_moe(directory: Path) -> None:
    """A float32 checkpoint of Llama 4's architecture: a dense layer and one of four fused experts."""
    config = transformers.Llama4TextConfig(
        **_SIZES,
        num_hidden_layers=2,
        intermediate_size=256,
        intermediate_size_mlp=512,
        num_local_experts=4,
        interleave_moe_layer_step=2,
        attention_chunk_size=8,
    )
    _save(transformers.Llama4ForCausalLM, config, directory, seed=12)


def make_float_mixtral(directory: Path) -> None:
    """A float32 checkpoint of Mixtral's architecture: a layer of four experts, stored one by one."""
    config = transformers.MixtralConfig(**_SIZES, num_hidden_layers=1, intermediate_size=256, num_local_experts=4)
    _save(transformers.MixtralForCausalLM, config, directory, seed=13)


def _save(model_class: Any, config: transformers.PretrainedConfig, directory: Path, seed: int) -> None:
    torch.manual_seed(seed)
    model = model_class._from_config(config).eval()
    randomize(model)
    model.save_pretrained(directory)


def matrices(float_dir: Path) -> Tensors:
    """Every matrix [out, in] that formats quantize, by name without ``.weight``; experts one by one."""
    found: Tensors = {}
    for name, tensor in load_file(float_dir / "model.safetensors").items():
        if fused := _FUSED.fullmatch(name):
            for expert, by_input in enumerate(tensor):
                rows = by_input.t()
                parts = {"down_proj": rows}
                if fused[2] == "gate_up_proj":
                    parts = dict(zip(("gate_proj", "up_proj"), rows.chunk(2), strict=True))
                found |= {f"{fused[1]}.{expert}.{part}": rows.contiguous() for part, rows in parts.items()}
        elif match := _MATRIX.fullmatch(name):
            found[match[1]] = tensor
    return found


def others(float_dir: Path) -> Tensors:
    """All tensors that are not matrices to be quantized, by their full names."""
    tensors = load_file(float_dir / "model.safetensors")
    return {name: t for name, t in tensors.items() if not _FUSED.fullmatch(name) and not _MATRIX.fullmatch(name)}


def write_quantized(float_dir: Path, out_dir: Path, tensors: Tensors, scheme: Mapping[str, Any]) -> None:
    """Write ``tensors`` (full names) and the float checkpoint's other tensors, with ``quantization_config``."""
    out_dir.mkdir(parents=True, exist_ok=True)
    whole = {name: tensor.contiguous() for name, tensor in (others(float_dir) | tensors).items()}
    save_file(whole, out_dir / "model.safetensors", {"format": "pt"})
    config = json.loads((float_dir / "config.json").read_text())
    (out_dir / "config.json").write_text(json.dumps(config | {"quantization_config": dict(scheme)}))


def write_float(float_dir: Path, out_dir: Path, values: Tensors) -> None:
    """The float checkpoint with other ``values`` of its matrices, named as ``matrices`` does, and of ``lm_head``
    where it is among them; experts fused again."""
    out_dir.mkdir(parents=True, exist_ok=True)
    tensors = load_file(float_dir / "model.safetensors")
    for name, tensor in tensors.items():
        if fused := _FUSED.fullmatch(name):
            kinds = ("gate_proj", "up_proj") if fused[2] == "gate_up_proj" else ("down_proj",)
            experts = [torch.cat([values[f"{fused[1]}.{n}.{kind}"] for kind in kinds]).t() for n in range(len(tensor))]
            tensors[name] = torch.stack(experts).contiguous()
        elif match := _MATRIX.fullmatch(name):
            tensors[name] = values[match[1]].contiguous()
        elif name == "lm_head.weight" and "lm_head" in values:
            tensors[name] = values["lm_head"]
    save_file(tensors, out_dir / "model.safetensors", {"format": "pt"})
    shutil.copy(float_dir / "config.json", out_dir)


def module_format(
    name: str,
    quantize_matrix: Callable[[str, torch.Tensor], Tensors],
    dequantize_matrix: Callable[[str, Tensors], torch.Tensor],
    scheme: Mapping[str, Any],
) -> Format:
    """A format in which each matrix becomes tensors of its own.

    ``quantize_matrix(module, [out, in])`` gives them by local name (``weight``, ``weight_scale``);
    ``dequantize_matrix(module, tensors)`` turns them back.
    """

    def quantize(float_dir: Path, out_dir: Path) -> None:
        tensors: Tensors = {}
        for module, weight in matrices(float_dir).items():
            tensors |= {f"{module}.{local}": t for local, t in quantize_matrix(module, weight).items()}
        write_quantized(float_dir, out_dir, tensors, scheme)

    def dequantized(float_dir: Path) -> Tensors:
        return {
            module: dequantize_matrix(module, quantize_matrix(module, weight))
            for module, weight in matrices(float_dir).items()
        }

    return Format(name, quantize, dequantized)


def compressed_tensors_format(
    name: str, layout: str, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None = None
) -> Format:
    """By compressed-tensors' own compressor. ``weights``, ``inputs``: QuantizationArgs' fields."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**weights),
        input_activations=QuantizationArgs(**inputs) if inputs else None,
    )
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, format=layout, quantization_status="compressed", ignore=UNQUANTIZED
    )
    compressor = BaseCompressor.get_value_from_registry(layout)

    def quantize_matrix(module: str, weight: torch.Tensor) -> Tensors:
        scale, zero_point = _observe(weight, scheme.weights)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero_point}
        if inputs and not inputs.get("dynamic"):
            state["input_scale"] = torch.full((1,), 0.05)
        compressed: Tensors = compressor.compress(state, scheme)
        return compressed

    def dequantize_matrix(module: str, tensors: Tensors) -> torch.Tensor:
        weight: torch.Tensor = compressor.decompress(tensors, scheme)["weight"]
        return weight

    return module_format(name, quantize_matrix, dequantize_matrix, config.model_dump(mode="json"))


def _observe(weight: torch.Tensor, args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point as compressed-tensors computes them from the smallest and largest values."""
    from compressed_tensors.quantization.utils import calculate_qparams

    match str(args.strategy):
        case "tensor":
            low, high = weight.min().view(1), weight.max().view(1)
        case "channel":
            low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        case "group":
            groups = weight.unflatten(1, (-1, args.group_size))
            low, high = groups.amin(-1), groups.amax(-1)
        case "block":
            rows, columns = args.block_structure
            padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows))
            blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
            low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
        case strategy:
            raise AssertionError(f"no observer for {strategy}")
    scale, zero_point = calculate_qparams(low, high, args)
    return scale, zero_point


_FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
_TOKEN = {"strategy": "token", "dynamic": True}


def _fbgemm() -> Format:
    """fbgemm's row-wise float8 has no library on CPUs; its layout is that of compressed-tensors' channels."""
    channel = compressed_tensors_format(
        "fp8-fbgemm", "float-quantized", _FLOAT8 | {"strategy": "channel"}, _FLOAT8 | _TOKEN
    )
    config = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}
    return Format("fp8-fbgemm", _with_scheme(channel, config), channel.dequantized)


def _autofp8() -> Format:
    """One scale a tensor, without dimensions, as AutoFP8 (the library is gone) wrote it."""
    tensor = compressed_tensors_format(
        "fp8-autofp8",
        "float-quantized",
        _FLOAT8 | {"strategy": "tensor"},
        _FLOAT8 | {"strategy": "tensor"},
    )
    config = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}

    def quantize(float_dir: Path, out_dir: Path) -> None:
        _with_scheme(tensor, config)(float_dir, out_dir)
        tensors = load_file(out_dir / "model.safetensors")
        scalars = {name: t.reshape(()) for name, t in tensors.items() if name.endswith("_scale")}
        save_file(tensors | scalars, out_dir / "model.safetensors", {"format": "pt"})

    return Format("fp8-autofp8", quantize, tensor.dequantized)


def _with_scheme(made: Format, scheme: Mapping[str, Any]) -> Callable[[Path, Path], None]:
    def quantize(float_dir: Path, out_dir: Path) -> None:
        made.quantize(float_dir, out_dir)
        config = json.loads((out_dir / "config.json").read_text())
        (out_dir / "config.json").write_text(json.dumps(config | {"quantization_config": dict(scheme)}))

    return quantize


def _deepseek() -> Format:
    """transformers' own conversion of float8 blocks."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
    from transformers.utils.quantization_config import FineGrainedFP8Config

    config = FineGrainedFP8Config(modules_to_not_convert=["lm_head", "router"])
    quantizer = FineGrainedFP8HfQuantizer(config)

    def quantize_matrix(module: str, weight: torch.Tensor) -> Tensors:
        made: Tensors = Fp8Quantize(quantizer).convert({"weight": weight})
        return {name.rpartition(".")[2]: tensor for name, tensor in made.items()}

    def dequantize_matrix(module: str, tensors: Tensors) -> torch.Tensor:
        given = {"weight": tensors["weight"], "weight_scale_inv": tensors["weight_scale_inv"]}
        (weight,) = Fp8Dequantize(quantizer).convert(dict(given)).values()
        return weight[0] if isinstance(weight, list) else weight

    scheme = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(config.weight_block_size),
        "modules_to_not_convert": config.modules_to_not_convert,
    }
    return module_format("fp8-deepseek", quantize_matrix, dequantize_matrix, scheme)


def _bnb_int8() -> Format:
    def quantize_matrix(module: str, weight: torch.Tensor) -> Tensors:
        from bitsandbytes import functional

        codes, row_maxima, _ = functional.int8_vectorwise_quant(weight.half())
        return {"weight": codes, "SCB": row_maxima}

    def dequantize_matrix(module: str, tensors: Tensors) -> torch.Tensor:
        from bitsandbytes import functional

        weight: torch.Tensor = functional.int8_vectorwise_dequant(tensors["weight"], tensors["SCB"])
        return weight

    scheme = {
        "quant_method": "bitsandbytes",
        "load_in_8bit": True,
        "load_in_4bit": False,
        "llm_int8_skip_modules": ["lm_head", "router"],
        "llm_int8_threshold": 6.0,
    }
    return module_format("int8-bitsandbytes", quantize_matrix, dequantize_matrix, scheme)


def _all_formats() -> list[Format]:
    channel, tensor, block = ({"strategy": "channel"}, {"strategy": "tensor"}, {"strategy": "block"})
    return [
        compressed_tensors_format("fp8-channel", "float-quantized", _FLOAT8 | channel, _FLOAT8 | _TOKEN),
        compressed_tensors_format("fp8-tensor-static", "float-quantized", _FLOAT8 | tensor, _FLOAT8 | tensor),
        compressed_tensors_format("fp8-block", "float-quantized", _FLOAT8 | block | {"block_structure": [128, 128]}),
        compressed_tensors_format("int8-channel", "int-quantized", _INT8 | channel, _INT8 | _TOKEN),
        _fbgemm(),
        _autofp8(),
        _deepseek(),
        _bnb_int8(),
    ]


FORMATS: dict[str, Format] = {made.name: made for made in _all_formats()}
