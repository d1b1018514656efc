"""Checkpoints in every four-bit format. Where no library of a format is here, it is written and read in numpy, straight
from the format's description: AutoAWQ's and GPTQModel's packing."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.quantization.checkpoints import Format, Tensors, compressed_tensors_format, module_format

GROUP = 64
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbouring outputs stands in each four bits of a word, from the lowest."""
_ONE_IN_EACH = 0x11111111


def quantize_groups(
    weight: np.ndarray, group_of_input: np.ndarray, scale_type: type[np.floating[Any]] = np.float16
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Round [in, out] to the nearest: codes [in, out], zero points and scales [groups, out]."""
    num_groups = int(group_of_input.max()) + 1
    codes = np.zeros(weight.shape, np.uint32)
    zeros = np.zeros((num_groups, weight.shape[1]), np.uint32)
    scales = np.zeros((num_groups, weight.shape[1]), scale_type)
    for group in range(num_groups):
        mine = group_of_input == group
        low, high = np.minimum(weight[mine].min(0), 0), np.maximum(weight[mine].max(0), 0)
        scales[group] = ((high - low) / 15).astype(scale_type)
        scale = scales[group].astype(np.float32)
        zeros[group] = np.clip(np.round(-low / scale), 0, 15)
        codes[mine] = np.clip(np.round(weight[mine] / scale) + zeros[group], 0, 15)
    return codes, zeros, scales


def dequantize_groups(
    codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, group_of_input: np.ndarray
) -> torch.Tensor:
    """[out, in] float32: each weight by the definition."""
    by_input = (codes.astype(np.float32) - zeros.astype(np.float32)[group_of_input]) * scales.astype(np.float32)[
        group_of_input
    ]
    return torch.from_numpy(np.ascontiguousarray(by_input.T))


def pack_columns(values: np.ndarray, order: tuple[int, ...] = tuple(range(8))) -> np.ndarray:
    """[n, m] to words [n, m / 8]: four bits number i, from the lowest, hold column ``order[i]`` of each eight."""
    words = np.zeros((values.shape[0], values.shape[1] // 8), np.uint32)
    for position, column in enumerate(order):
        words |= values[:, column::8] << np.uint32(4 * position)
    return words


def unpack_columns(words: np.ndarray, order: tuple[int, ...] = tuple(range(8))) -> np.ndarray:
    values = np.zeros((words.shape[0], words.shape[1] * 8), np.uint32)
    for position, column in enumerate(order):
        values[:, column::8] = (words >> np.uint32(4 * position)) & np.uint32(15)
    return values


def _int32(words: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(words).view(np.int32))


def _uint32(words: torch.Tensor) -> np.ndarray:
    return words.numpy().view(np.uint32)


def in_order(num_inputs: int, group_size: int) -> np.ndarray:
    """The group of each input where groups are runs of ``group_size``."""
    return np.arange(num_inputs) // group_size


def quantize_awq(weight: torch.Tensor, group_size: int) -> Tensors:
    by_input = weight.numpy().T
    codes, zeros, scales = quantize_groups(by_input, in_order(len(by_input), group_size))
    return {
        "qweight": _int32(pack_columns(codes, _AWQ_ORDER)),
        "qzeros": _int32(pack_columns(zeros, _AWQ_ORDER)),
        "scales": torch.from_numpy(scales),
    }


def dequantize_awq(tensors: Tensors) -> torch.Tensor:
    codes = unpack_columns(_uint32(tensors["qweight"]), _AWQ_ORDER)
    zeros = unpack_columns(_uint32(tensors["qzeros"]), _AWQ_ORDER)
    group_of_input = in_order(len(codes), len(codes) // len(zeros))
    return dequantize_groups(codes, zeros, tensors["scales"].numpy(), group_of_input)


def _awq(name: str = "int4-awq") -> Format:
    scheme = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    return module_format(
        name,
        lambda module, weight: quantize_awq(weight, GROUP),
        lambda module, tensors: dequantize_awq(tensors),
        scheme | {"modules_to_not_convert": ["lm_head", "router"]},
    )


def quantize_gptq(weight: torch.Tensor, group_of_input: np.ndarray, is_first_form: bool) -> Tensors:
    """``is_first_form``: zero points are stored minus one, taken from whole words as GPTQModel does, which borrows."""
    by_input = weight.numpy().T.copy()
    # An output without negative weights has a zero point of 0.
    by_input[:, 3] = np.abs(by_input[:, 3])
    codes, zeros, scales = quantize_groups(by_input, group_of_input)
    assert (zeros[:, 3] == 0).all()
    packed = pack_columns(zeros) - np.uint32(_ONE_IN_EACH if is_first_form else 0)
    return {
        "qweight": _int32(pack_columns(codes.T).T),
        "qzeros": _int32(packed),
        "scales": torch.from_numpy(scales),
        "g_idx": torch.from_numpy(group_of_input.astype(np.int32)),
    }


def dequantize_gptq(tensors: Tensors, is_first_form: bool) -> torch.Tensor:
    codes = unpack_columns(_uint32(tensors["qweight"]).T).T
    zeros = unpack_columns(_uint32(tensors["qzeros"]) + np.uint32(_ONE_IN_EACH if is_first_form else 0))
    return dequantize_groups(codes, zeros, tensors["scales"].numpy(), tensors["g_idx"].numpy())


def shuffled(num_inputs: int, group_size: int, seed: str) -> np.ndarray:
    """Groups of inputs in the order that ``desc_act`` chose: of the same sizes, but another order in each matrix."""
    return np.random.default_rng(list(seed.encode())).permutation(in_order(num_inputs, group_size))


def _gptq(name: str, group_size: int, desc_act: bool, is_first_form: bool) -> Format:
    def quantize(module: str, weight: torch.Tensor) -> Tensors:
        num_inputs = weight.shape[1]
        size = group_size if group_size > 0 else num_inputs
        groups = shuffled(num_inputs, size, module) if desc_act else in_order(num_inputs, size)
        return quantize_gptq(weight, groups, is_first_form)

    scheme = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": group_size,
        "desc_act": desc_act,
        "sym": False,
        "checkpoint_format": "gptq" if is_first_form else "gptq_v2",
    }
    return module_format(name, quantize, lambda module, tensors: dequantize_gptq(tensors, is_first_form), scheme)


def _nf4(name: str, is_nested: bool) -> Format:
    def quantize(module: str, weight: torch.Tensor) -> Tensors:
        from bitsandbytes import functional

        packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=is_nested)
        return {"weight": packed} | {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}

    def dequantize(module: str, tensors: Tensors) -> torch.Tensor:
        from bitsandbytes import functional

        stored = {key: value for key, value in tensors.items() if key != "weight"}
        state = functional.QuantState.from_dict(stored, torch.device("cpu"))
        weight: torch.Tensor = functional.dequantize_4bit(tensors["weight"], state)
        return weight

    scheme: dict[str, Any] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": is_nested,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_compute_dtype": "bfloat16",
        "llm_int8_skip_modules": ["lm_head", "router"],
    }
    return module_format(name, quantize, dequantize, scheme)


_INT4 = {"num_bits": 4, "type": "int"}
_SYMMETRIC, _ASYMMETRIC = {"symmetric": True}, {"symmetric": False}
_GROUPS, _CHANNEL = {"strategy": "group", "group_size": 128}, {"strategy": "channel"}


def _packed(name: str, weights: dict[str, Any]) -> Format:
    return compressed_tensors_format(name, "pack-quantized", _INT4 | weights)


_MAKERS: dict[str, Callable[[str], Format]] = {
    "int4-group": lambda name: _packed(name, _SYMMETRIC | _GROUPS),
    "int4-asymmetric": lambda name: _packed(name, _ASYMMETRIC | _GROUPS | {"group_size": GROUP}),
    "int4-channel": lambda name: _packed(name, _SYMMETRIC | _CHANNEL),
    "int4-asymmetric-channel": lambda name: _packed(name, _ASYMMETRIC | _CHANNEL),
    "int4-awq": _awq,
    "int4-gptq": lambda name: _gptq(name, GROUP, desc_act=False, is_first_form=True),
    "int4-gptq-v2": lambda name: _gptq(name, -1, desc_act=False, is_first_form=False),
    "int4-gptq-desc-act": lambda name: _gptq(name, GROUP, desc_act=True, is_first_form=True),
    "nf4": lambda name: _nf4(name, is_nested=True),
    "nf4-single": lambda name: _nf4(name, is_nested=False),
}
FORMATS: dict[str, Format] = {name: make(name) for name, make in _MAKERS.items()}

INT4_EXPERTS = {name: FORMATS[name] for name in ("int4-group", "int4-awq", "int4-gptq", "int4-gptq-desc-act")}
"""Formats in which mixtures of experts are held against their oracles."""


def change_tensors(directory: Path, out_dir: Path, change: Mapping[str, torch.Tensor | None]) -> None:
    """A copy of a checkpoint with other tensors, or without where one is None."""
    tensors = load_file(directory / "model.safetensors") | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, out_dir / "model.safetensors")
    shutil.copy(directory / "config.json", out_dir)
