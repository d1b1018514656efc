"""GGUF files for tests, written by the gguf package, whose quantizers and dequantizers are the oracle."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from engine.gguf.block_types import QUANTIZED_TYPES

_SPREAD = {"Q4_0": (4.6,), "Q8_0": (74.0,), "Q4_K": (250.0, 7.5), "Q5_K": (500.0, 15.5), "Q6_K": (1370.0,)}
"""Standard deviation of random codes with a scale of one, and how much larger the scale of minima must be, so that the
values have a mean of zero."""


def random_blocks(kind: str, shape: tuple[int, ...], generator: np.random.Generator, deviation: float = 1.0) -> Any:
    """Blocks of a quantized ``kind`` in random bytes, with finite scales: [*shape[:-1], bytes of a row] uint8. What
    they stand for has about the standard ``deviation``.

    The gguf package cannot encode all kinds; any bytes with finite scales are valid ones.
    """
    elements, num_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    assert shape[-1] % elements == 0
    blocks = generator.integers(0, 256, (*shape[:-1], shape[-1] // elements, num_bytes), dtype=np.uint8)
    spread, *of_minima = _SPREAD[kind]
    for offset, factor in zip(QUANTIZED_TYPES[kind].scale_offsets, [1.0, *of_minima], strict=True):
        scales = generator.uniform(0.5, 1.5, blocks.shape[:-1]) * factor * deviation / spread
        blocks[..., offset : offset + 2] = scales.astype(np.float16)[..., None].view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def write_gguf(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, tuple[str, Any]],
    alignment: int = 0,
) -> None:
    """``tensors``: by name, the format and the values (float32, or the blocks' bytes)."""
    writer = gguf.GGUFWriter(path, architecture)
    if alignment:
        writer.add_custom_alignment(alignment)
    for key, value in metadata.items():
        _add(writer, key, value)
    for name, (kind, values) in tensors.items():
        number = GGMLQuantizationType[kind]
        if kind in QUANTIZED_TYPES and values.dtype == np.uint8:
            data = values
        else:
            data = gguf.quants.quantize(np.ascontiguousarray(values, np.float32), number)
        writer.add_tensor(name, data, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, list(value))
