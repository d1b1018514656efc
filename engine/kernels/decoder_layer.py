"""A decoder layer, dense or a mixture of experts, or the attention half of any, as one native call on CPUs with tile
units (engine/kernels/native/decoder_layer.cpp)."""

import ctypes
import functools
from typing import Any

import torch

from engine.kernels.mixture import NativeMixture
from engine.kernels.native_library import tile_library
from engine.kernels.native_matrix import NativeMatrix

_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64


class NativeLayer(ctypes.Structure):
    """Head numbers are this rank's. ``group``: of its collectives; null where it is alone on the axis.

    interleaved: how heads turn, where they do (``rotates``). normalizes_heads: queries and keys, after that; without
    weights. scales_queries: by the step's query_scales. gate_up and down: of dense layers only. feed_forward_norm: of
    whole layers only.
    """

    _fields_ = (
        *((name, NativeMatrix) for name in ("qkv", "output", "gate_up", "down")),
        ("attention_norm", _POINTER),
        ("feed_forward_norm", _POINTER),
        ("group", _POINTER),
        *((name, _NUMBER) for name in ("split_bytes", "num_heads", "num_kv_heads", "head_dim", "rotates")),
        *((name, _NUMBER) for name in ("interleaved", "normalizes_heads", "scales_queries")),
        ("eps", ctypes.c_float),
    )


class NativeAttended(ctypes.Structure):
    """What a step's tokens attend to in the layers of one KV group: as ``Prompts`` and ``DecodeRequests`` have it."""

    _fields_ = (
        *((name, _POINTER) for name in ("slots", "block_tables")),
        *((name, _NUMBER) for name in ("table_width", "block_size", "chunk_size", "window_size")),
        *((f"prompt_{name}", _POINTER) for name in ("rows", "tables", "starts", "counts")),
        ("num_prompts", _NUMBER),
        *((f"decode_{name}", _POINTER) for name in ("rows", "tables", "firsts", "lasts")),
        ("num_decodes", _NUMBER),
    )


class NativeBuffers(ctypes.Structure):
    """Space for one step's tokens, and the angles of their rotation."""

    _fields_ = (
        *((name, _POINTER) for name in ("normed", "qkv", "query", "attended", "gate_up", "inner", "cosines", "sines")),
        ("query_scales", _POINTER),
        ("num_tokens", _NUMBER),
    )


def decoder_layer(
    layer: NativeLayer,
    mixture: NativeMixture | None,
    seen: NativeAttended,
    buffers: NativeBuffers,
    hidden: torch.Tensor,
    update: torch.Tensor | None,
    output: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
) -> int:
    """Add ``update`` to ``hidden`` [T, n], in place; ``output`` [T, n] gets what attention gives, which is still to be
    added, and may be ``update``. A dense layer, and one with a ``mixture``, adds that too, and ``output`` gets what its
    feed-forward part gives. All bfloat16 and contiguous.

    Returns what a failed collective returned, else 0.
    """
    library = _library()
    assert library is not None
    function, head = library.remuda_attention_layer, [ctypes.byref(layer)]
    if layer.gate_up.weights is not None:
        function = library.remuda_decoder_layer
    elif mixture is not None:
        function, head = library.remuda_mixture_layer, [ctypes.byref(layer), ctypes.byref(mixture)]
    result: int = function(
        *head,
        ctypes.byref(seen),
        ctypes.byref(buffers),
        hidden.data_ptr(),
        None if update is None else update.data_ptr(),
        output.data_ptr(),
        caches[0].data_ptr(),
        caches[1].data_ptr(),
    )
    return result


def has_decoder_layer() -> bool:
    return _library() is not None


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = tile_library()
    if library is None:
        return None
    argtypes: list[Any] = [_POINTER] * 8
    for function in (library.remuda_decoder_layer, library.remuda_attention_layer):
        function.argtypes, function.restype = argtypes, ctypes.c_int32
    library.remuda_mixture_layer.argtypes = [_POINTER, *argtypes]
    library.remuda_mixture_layer.restype = ctypes.c_int32
    return library
