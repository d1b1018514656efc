"""Which matrices of a checkpoint are quantized, and how, as config.json's ``quantization_config`` says. Torch-free.

The layouts are those of compressed-tensors, fbgemm, DeepSeek, AutoAWQ, GPTQ and bitsandbytes; see engine.quantization.
"""

import enum
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.errors import CheckpointError, InvalidOption


class WeightFormat(enum.StrEnum):
    """How a matrix is held in memory and checkpoint. ``ONLINE_*``: a float checkpoint, quantized while loading."""

    FP8 = "fp8"
    """e4m3 with a scale for the tensor or for each row."""
    FP8_BLOCKS = "fp8-blocks"
    """e4m3 with a scale for each block of rows and columns."""
    INT8 = "int8"
    """int8 with a scale for each row."""
    INT4 = "int4"
    """compressed-tensors' pack-quantized form."""
    AWQ = "awq"
    GPTQ = "gptq"
    NF4 = "nf4"
    BNB_INT8 = "bnb-int8"
    """bitsandbytes' int8."""
    GGUF = "gguf"
    ONLINE_FP8 = "online-fp8"
    ONLINE_INT8 = "online-int8"
    ONLINE_INT4 = "online-int4"


@dataclass(frozen=True)
class MatrixFormat:
    """How one matrix is held.

    ``group_size``: inputs that share a scale, for the int4 formats; 0: a whole row. ``symmetric``: no zero points.
    ``scale_per_row``: FP8 with one scale a row, not one a tensor. ``block_size``: (rows, columns) of FP8_BLOCKS.
    ``static_inputs``: the checkpoint also has an ``input_scale``. ``input_bound``: fbgemm's upper bound of what
    activations are scaled by. ``stores_zero_minus_one``: GPTQ's first form. ``reorders_inputs``: GPTQ with ``g_idx``
    out of order. ``gguf_type``: the block format's name in GGUF, such as Q4_K.
    """

    kind: WeightFormat
    group_size: int = 0
    symmetric: bool = True
    scale_per_row: bool = True
    block_size: tuple[int, int] = (128, 128)
    static_inputs: bool = False
    input_bound: float | None = None
    stores_zero_minus_one: bool = False
    reorders_inputs: bool = False
    gguf_type: str = ""


@dataclass(frozen=True)
class QuantizationConfig:
    """Which matrix is in which format.

    ``name``: for people, such as "fp8 (compressed-tensors)". ``rules``: pairs of targets and format, of which the
    first that matches counts. A target is ``Linear`` (every matrix), the name of a module or its end, or ``re:`` and a
    regular expression that matches at the beginning of the name. ``ignored``: targets that are not quantized. Names
    are those of the checkpoint.
    """

    name: str
    rules: tuple[tuple[tuple[str, ...], MatrixFormat], ...]
    ignored: tuple[str, ...] = ()
    by_name: Mapping[str, MatrixFormat] = field(default_factory=dict)
    """GGUF: each tensor's own format. Where it is not empty, the rules do not count."""

    def format_of(self, module: str) -> MatrixFormat | None:
        """Of the matrix ``module`` (its name in the checkpoint, without ``.weight``); None: not quantized."""
        if self.by_name:
            return self.by_name.get(module)
        if any(_matches(target, module) for target in self.ignored):
            return None
        return next((form for targets, form in self.rules if any(_matches(t, module) for t in targets)), None)


def _matches(target: str, module: str) -> bool:
    if target == "Linear":
        return True
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return f".{target}." in f".{module}."


def online_quantization(name: str) -> QuantizationConfig:
    """``--quantization``: a float checkpoint, quantized while it is loaded. Raises InvalidOption."""
    kinds = {
        "fp8": MatrixFormat(WeightFormat.ONLINE_FP8),
        "int8": MatrixFormat(WeightFormat.ONLINE_INT8),
        "int4": MatrixFormat(WeightFormat.ONLINE_INT4, group_size=128, symmetric=False),
    }
    if name not in kinds:
        raise InvalidOption(f"--quantization {name} is not known; use {', '.join(sorted(kinds))}, or leave it out")
    return QuantizationConfig(f"{name} (quantized while loading)", ((("Linear",), kinds[name]),), ("lm_head",))


def parse_quantization(config: Mapping[str, Any]) -> QuantizationConfig:
    """The contents of ``quantization_config``. Raises CheckpointError, naming what is not served."""
    method = str(config.get("quant_method", ""))
    parse = _PARSERS.get(method)
    if parse is None:
        raise CheckpointError(
            f"the checkpoint is quantized by {method or 'an unnamed method'}; served are {', '.join(sorted(_PARSERS))}"
        )
    return parse(config)


def _compressed_tensors(config: Mapping[str, Any]) -> QuantizationConfig:
    rules = []
    for group in config["config_groups"].values():
        rules.append((tuple(group["targets"]), _compressed_format(group, str(group.get("format") or config["format"]))))
    kinds = "+".join(dict.fromkeys(str(form.kind) for _, form in rules))
    return QuantizationConfig(f"{kinds} (compressed-tensors)", tuple(rules), tuple(config.get("ignore") or ()))


def _compressed_format(group: Mapping[str, Any], layout: str) -> MatrixFormat:
    weights = group["weights"]
    inputs = group.get("input_activations") or {"dynamic": True}
    static = not inputs.get("dynamic", False)
    key = (layout, weights["type"], weights["num_bits"], weights["strategy"])
    match key:
        case ("float-quantized" | "naive-quantized", "float", 8, "tensor" | "channel" as strategy):
            return MatrixFormat(WeightFormat.FP8, scale_per_row=strategy == "channel", static_inputs=static)
        case ("float-quantized" | "naive-quantized", "float", 8, "block"):
            rows, columns = weights["block_structure"]
            return MatrixFormat(WeightFormat.FP8_BLOCKS, block_size=(int(rows), int(columns)))
        case ("int-quantized" | "naive-quantized", "int", 8, "channel" | "tensor" as strategy) if weights["symmetric"]:
            return MatrixFormat(WeightFormat.INT8, scale_per_row=strategy == "channel", static_inputs=static)
        case ("pack-quantized", "int", 4, "group" | "channel"):
            size = int(weights.get("group_size") or 0)
            return MatrixFormat(WeightFormat.INT4, group_size=max(size, 0), symmetric=bool(weights["symmetric"]))
    raise CheckpointError(
        "compressed-tensors: layout {} with {}{} weights and {} scales is not served".format(*key[:3], key[3])
    )


def _fbgemm_fp8(config: Mapping[str, Any]) -> QuantizationConfig:
    form = MatrixFormat(WeightFormat.FP8, input_bound=float(config.get("activation_scale_ub") or 1200.0))
    ignored = tuple(config.get("modules_to_not_convert") or ("lm_head",))
    return QuantizationConfig("fp8 (fbgemm)", ((("Linear",), form),), ignored)


def _deepseek_fp8(config: Mapping[str, Any]) -> QuantizationConfig:
    rows, columns = config.get("weight_block_size") or (128, 128)
    form = MatrixFormat(WeightFormat.FP8_BLOCKS, block_size=(int(rows), int(columns)))
    ignored = tuple(config.get("modules_to_not_convert") or ("lm_head",))
    return QuantizationConfig("fp8 (128 × 128 blocks)", ((("Linear",), form),), ignored)


def _awq(config: Mapping[str, Any]) -> QuantizationConfig:
    bits, version = config.get("bits", config.get("w_bit", 4)), str(config.get("version", "gemm")).lower()
    if bits != 4 or version != "gemm":
        raise CheckpointError(f"AWQ with {bits} bits in version {version} is not served; 4 bits in version gemm is")
    form = MatrixFormat(WeightFormat.AWQ, int(config.get("group_size", config.get("q_group_size", 128))), False)
    return QuantizationConfig("int4 (AWQ)", ((("Linear",), form),), _skipped(config))


def _gptq(config: Mapping[str, Any]) -> QuantizationConfig:
    if (bits := config.get("bits", 4)) != 4:
        raise CheckpointError(f"GPTQ with {bits} bits; served are 4")
    form = MatrixFormat(
        WeightFormat.GPTQ,
        max(int(config.get("group_size", 128)), 0),
        symmetric=False,
        stores_zero_minus_one=str(config.get("checkpoint_format", "gptq")) != "gptq_v2",
        reorders_inputs=bool(config.get("desc_act", False)),
    )
    return QuantizationConfig("int4 (GPTQ)", ((("Linear",), form),), _skipped(config))


def _bitsandbytes(config: Mapping[str, Any]) -> QuantizationConfig:
    if config.get("load_in_8bit"):
        return QuantizationConfig(
            "int8 (bitsandbytes)", ((("Linear",), MatrixFormat(WeightFormat.BNB_INT8)),), _skipped(config)
        )
    if (kind := config.get("bnb_4bit_quant_type", "fp4")) != "nf4":
        raise CheckpointError(f"bitsandbytes' 4-bit type {kind} is not served; nf4 is")
    form = MatrixFormat(WeightFormat.NF4, group_size=64)
    return QuantizationConfig("nf4 (bitsandbytes)", ((("Linear",), form),), _skipped(config))


def _skipped(config: Mapping[str, Any]) -> tuple[str, ...]:
    return ("lm_head", *(config.get("modules_to_not_convert") or config.get("llm_int8_skip_modules") or ()))


_PARSERS: dict[str, Callable[[Mapping[str, Any]], QuantizationConfig]] = {
    "compressed-tensors": _compressed_tensors,
    "fbgemm_fp8": _fbgemm_fp8,
    "fp8": _deepseek_fp8,
    "awq": _awq,
    "gptq": _gptq,
    "bitsandbytes": _bitsandbytes,
}
