"""Which matrices of a checkpoint are quantized, and how, as config.json's ``quantization_config`` says. Torch-free.

The layouts are those of compressed-tensors, fbgemm, DeepSeek, AutoFP8, AutoAWQ, GPTQ and bitsandbytes; see
engine.quantization.
"""

import enum
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    ``scale_per_row``: FP8 and INT8 with one scale a row, not one a tensor. ``block_size``: (rows, columns) of
    FP8_BLOCKS; ``scale_name``: what the checkpoint calls their scales. ``input_bound``: fbgemm's upper bound of what
    activations are scaled by. ``rounds_inputs``: INT8 with activations that may be rounded to int8 too, each token by
    a scale of its own. ``stores_zero_minus_one``: GPTQ's first form. ``reorders_inputs``: int4 with ``g_idx``
    out of order. ``nested_scales``: NF4 whose scales are quantized too. ``gguf_type``: the block format's name in GGUF,
    such as Q4_K.
    """

    kind: WeightFormat
    group_size: int = 0
    symmetric: bool = True
    scale_per_row: bool = True
    block_size: tuple[int, int] = (128, 128)
    scale_name: str = "weight_scale"
    input_bound: float | None = None
    rounds_inputs: bool = False
    stores_zero_minus_one: bool = False
    reorders_inputs: bool = False
    nested_scales: bool = False
    gguf_type: str = ""


@dataclass(frozen=True)
class QuantizationConfig:
    """Which matrix is in which format.

    ``name``: for people, such as "fp8 (compressed-tensors)". ``rules``: pairs of targets and format, of which the
    first that matches counts. A target is ``Linear`` (every matrix), the whole name of a matrix, ``re:`` and a regular
    expression that matches from the beginning of the name, or ``*`` and the name's end; another class's name matches
    no matrix. ``ignored``: targets that are not quantized. Names are those of the checkpoint.
    """

    name: str
    rules: tuple[tuple[tuple[str, ...], MatrixFormat], ...]
    ignored: tuple[str, ...] = ()
    by_name: Mapping[str, MatrixFormat] = field(default_factory=dict)
    """GGUF: each tensor's own format. Where it is not empty, the rules do not count."""

    @property
    def rounds_inputs(self) -> bool:
        """Whether activations may be rounded too, at some matrix."""
        return any(form.rounds_inputs for _, form in self.rules)

    def format_of(self, module: str) -> MatrixFormat | None:
        """Of the matrix ``module`` (its name in the checkpoint, without ``.weight``); None: not quantized."""
        if self.by_name:
            return self.by_name.get(module)
        if any(_matches(target, module) for target in self.ignored):
            return None
        return next((form for targets, form in self.rules if any(_matches(t, module) for t in targets)), None)


def _matches(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    if target.startswith("*"):
        return module.endswith(target[1:])
    return target in ("Linear", module)


def online_quantization(name: str) -> QuantizationConfig:
    """``--quantization``: a float checkpoint, quantized while it is loaded. Raises InvalidOption.

    int8 takes an output head that is a matrix of its own too; one that is also the embedding stays as it is.
    """
    kinds = {
        "fp8": MatrixFormat(WeightFormat.ONLINE_FP8),
        "int8": MatrixFormat(WeightFormat.ONLINE_INT8, rounds_inputs=True),
        "int4": MatrixFormat(WeightFormat.ONLINE_INT4, group_size=128, symmetric=False),
    }
    if name not in kinds:
        raise InvalidOption(f"--quantization {name} is not known; use {', '.join(sorted(kinds))}, or leave it out")
    ignored = ("*embed_tokens",) if name == "int8" else ("*embed_tokens", "lm_head")
    return QuantizationConfig(f"{name} (quantized while loading)", ((("Linear",), kinds[name]),), ignored)


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
    forms: dict[str, MatrixFormat] = {}
    for group in config["config_groups"].values():
        form = _compressed_format(group, str(group.get("format") or config["format"]))
        forms |= dict.fromkeys(map(str, group["targets"]), form)
    kinds = "+".join(dict.fromkeys(str(form.kind) for form in forms.values()))
    rules = tuple(((target,), forms[target]) for target in sorted(forms, key=_generality))
    ignored = tuple(map(str, config.get("ignore") or ()))
    _check_expressions(target[3:] for target in (*forms, *ignored) if target.startswith("re:"))
    return QuantizationConfig(f"{kinds} (compressed-tensors)", rules, ignored)


def _generality(target: str) -> tuple[int, str]:
    """In the order in which compressed-tensors prefers targets: names, expressions, classes."""
    return (2 if target == "Linear" else int(target.startswith("re:"))), target


def _check_expressions(expressions: Iterable[str]) -> None:
    for expression in expressions:
        try:
            re.compile(expression)
        except re.error as error:
            raise CheckpointError(f"quantization_config: {expression!r} is no regular expression: {error}") from error


def _compressed_format(group: Mapping[str, Any], layout: str) -> MatrixFormat:
    weights = group["weights"]
    key = (layout, weights["type"], weights["num_bits"], weights["strategy"])
    match key:
        case ("float-quantized" | "naive-quantized", "float", 8, "tensor" | "channel" as strategy):
            return MatrixFormat(WeightFormat.FP8, scale_per_row=strategy == "channel")
        case ("float-quantized" | "naive-quantized", "float", 8, "block"):
            return MatrixFormat(WeightFormat.FP8_BLOCKS, block_size=_block_size(weights["block_structure"]))
        case ("int-quantized" | "naive-quantized", "int", 8, "channel" | "tensor" as strategy) if weights["symmetric"]:
            rounds_inputs = (group.get("input_activations") or {}).get("num_bits") == 8
            return MatrixFormat(WeightFormat.INT8, scale_per_row=strategy == "channel", rounds_inputs=rounds_inputs)
        case ("pack-quantized", "int", 4, "group" | "channel"):
            size = max(int(weights.get("group_size") or 0), 0)
            reorders = weights.get("actorder") in (True, "group")
            symmetric = bool(weights["symmetric"])
            return MatrixFormat(WeightFormat.INT4, size, symmetric=symmetric, reorders_inputs=reorders)
    raise CheckpointError(
        "compressed-tensors: layout {} with {}{} weights and {} scales is not served".format(*key[:3], key[3])
    )


def _fbgemm_fp8(config: Mapping[str, Any]) -> QuantizationConfig:
    form = MatrixFormat(WeightFormat.FP8, input_bound=float(config.get("activation_scale_ub") or 1200.0))
    return QuantizationConfig("fp8 (fbgemm)", ((("Linear",), form),), _skipped(config))


def _fp8(config: Mapping[str, Any]) -> QuantizationConfig:
    """DeepSeek's blocks, or, where no block sizes are named, AutoFP8's one scale a tensor."""
    if "weight_block_size" not in config:
        form = MatrixFormat(WeightFormat.FP8, scale_per_row=False)
        ignored = "lm_head", *map(str, config.get("ignored_layers") or ())
        return QuantizationConfig("fp8 (AutoFP8)", ((("Linear",), form),), ignored)
    size = config["weight_block_size"]
    if size is None:
        raise CheckpointError("quantization_config: fp8 with weight_block_size null is not served; block sizes are")
    rows, columns = _block_size(size)
    form = MatrixFormat(WeightFormat.FP8_BLOCKS, block_size=(rows, columns), scale_name="weight_scale_inv")
    name = f"fp8 ({rows} × {columns} blocks)"
    return QuantizationConfig(name, ((("Linear",), form),), _skipped(config))


def _block_size(given: Sequence[Any]) -> tuple[int, int]:
    rows, columns = (int(number) for number in given)
    if rows < 1 or columns < 1:
        raise CheckpointError(f"quantization_config: blocks of {rows} × {columns} weights; both must be above 0")
    return rows, columns


def _awq(config: Mapping[str, Any]) -> QuantizationConfig:
    bits, version = config.get("bits", config.get("w_bit", 4)), str(config.get("version") or "gemm").lower()
    if bits != 4 or version != "gemm":
        raise CheckpointError(f"AWQ with {bits} bits in version {version} is not served; 4 bits in version gemm is")
    group_size = max(int(config.get("group_size", config.get("q_group_size", 128))), 0)
    form = MatrixFormat(WeightFormat.AWQ, group_size, symmetric=False)
    return QuantizationConfig("int4 (AWQ)", ((("Linear",), form),), _skipped(config))


def _gptq(config: Mapping[str, Any]) -> QuantizationConfig:
    layout = str(config.get("checkpoint_format") or "gptq")
    if (bits := config.get("bits", 4)) != 4:
        raise CheckpointError(f"GPTQ with {bits} bits; served are 4")
    if layout not in ("gptq", "gptq_v2"):
        raise CheckpointError(f"GPTQ in checkpoint_format {layout} is not served; gptq and gptq_v2 are")
    form = MatrixFormat(
        WeightFormat.GPTQ,
        max(int(config.get("group_size", 128)), 0),
        symmetric=False,
        stores_zero_minus_one=layout == "gptq",
        reorders_inputs=bool(config.get("desc_act", False)),
    )
    listed = config.get("modules_in_block_to_quantize") or ()
    names = [name for entry in listed for name in ([entry] if isinstance(entry, str) else entry)]
    targets = tuple(rf"re:.*\.{re.escape(name)}$" for name in names) or ("Linear",)
    ignored = (*_skipped(config), *_gptq_exclusions(config.get("dynamic") or {}))
    return QuantizationConfig("int4 (GPTQ)", ((targets, form),), ignored)


def _gptq_exclusions(dynamic: Mapping[str, Any]) -> list[str]:
    """Targets of GPTQModel's ``dynamic``: keys ``-:`` and a regular expression for what is not quantized."""
    for key in dynamic:
        if not key.startswith("-:"):
            raise CheckpointError(f"GPTQ with rules of its own for {key} is not served; only exclusions (-:) are")
    targets = [f"re:{key[2:]}" for key in dynamic]
    _check_expressions(targets)
    return targets


def _bitsandbytes(config: Mapping[str, Any]) -> QuantizationConfig:
    if config.get("load_in_8bit"):
        return QuantizationConfig(
            "int8 (bitsandbytes)", ((("Linear",), MatrixFormat(WeightFormat.BNB_INT8)),), _skipped(config)
        )
    if (kind := config.get("bnb_4bit_quant_type", "fp4")) != "nf4":
        raise CheckpointError(f"bitsandbytes' 4-bit type {kind} is not served; nf4 is")
    if (storage := config.get("bnb_4bit_quant_storage") or "uint8") != "uint8":
        raise CheckpointError(f"bitsandbytes' 4-bit weights stored as {storage} are not served; as uint8 they are")
    is_nested = bool(config.get("bnb_4bit_use_double_quant", False))
    form = MatrixFormat(WeightFormat.NF4, group_size=64, nested_scales=is_nested)
    return QuantizationConfig("nf4 (bitsandbytes)", ((("Linear",), form),), _skipped(config))


def _skipped(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Targets for the modules that transformers would leave alone: an entry is a regular expression for the beginning
    of the name, up to a dot or its end, or the end of the name."""
    entries = [str(name) for name in config.get("modules_to_not_convert") or config.get("llm_int8_skip_modules") or ()]
    if not entries:
        return ("lm_head",)
    _check_expressions(entries)
    # One expression for all: Meta's 405B checkpoint has hundreds of entries.
    beginnings = "|".join(f"(?:{entry})" for entry in entries)
    return "lm_head", rf"re:(?:{beginnings})(?:(?<=\.)|(?=\.|$))", *(f"*{entry}" for entry in entries)


_PARSERS: dict[str, Callable[[Mapping[str, Any]], QuantizationConfig]] = {
    "compressed-tensors": _compressed_tensors,
    "fbgemm_fp8": _fbgemm_fp8,
    "fp8": _fp8,
    "awq": _awq,
    "gptq": _gptq,
    "bitsandbytes": _bitsandbytes,
}
