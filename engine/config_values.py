"""What kind of value may stand under which name in config.json. Torch-free.

Checked before anything is computed with them, so that a broken file is refused with the name and the value.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from engine.errors import CheckpointError, RemudaError

_MOST = 2**31 - 1
_MOST_PARTS = 10_000
"""Layers of a model, experts of a layer."""


@dataclass(frozen=True)
class _Kind:
    """``what``: for people."""

    what: str
    fits: Callable[[Any], bool]


def _is_whole(value: Any, least: int, most: int = _MOST) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _are_token_ids(value: Any) -> bool:
    return all(_is_whole(token_id, 0) for token_id in (value if isinstance(value, list) else [value]))


_SIZE = _Kind("a whole number above 0", lambda value: _is_whole(value, 1))
_SIZE_OR_ZERO = _Kind("a whole number", lambda value: _is_whole(value, 0))
_PARTS = _Kind(f"a whole number from 0 to {_MOST_PARTS}", lambda value: _is_whole(value, 0, _MOST_PARTS))
_LAYERS = _Kind(f"a whole number from 1 to {_MOST_PARTS}", lambda value: _is_whole(value, 1, _MOST_PARTS))
_POSITIVE = _Kind("a number above 0", _is_positive)
_TOKEN_IDS = _Kind("a token id or a list of token ids", _are_token_ids)
_FLAG = _Kind("true or false", lambda value: isinstance(value, int))
_LIST = _Kind("a list", lambda value: isinstance(value, list))
_OBJECT = _Kind("an object", lambda value: isinstance(value, Mapping))

_NEVER_NULL: Mapping[str, _Kind] = {
    **dict.fromkeys(
        (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "intermediate_size_mlp",
            "moe_intermediate_size",
            "num_attention_heads",
            "num_experts_per_tok",
            "decoder_sparse_step",
        ),
        _SIZE,
    ),
    "num_hidden_layers": _LAYERS,
    **dict.fromkeys(("rms_norm_eps", "floor_scale"), _POSITIVE),
}
_OR_NULL: Mapping[str, _Kind] = {
    **dict.fromkeys(
        ("num_key_value_heads", "head_dim", "max_position_embeddings", "max_sequence_length", "sliding_window"), _SIZE
    ),
    **dict.fromkeys(("attention_chunk_size", "interleave_moe_layer_step", "max_window_layers"), _SIZE_OR_ZERO),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "no_rope_layer_interval"), _PARTS),
    **dict.fromkeys(("num_global_layers", "num_nextn_predict_layers"), _PARTS),
    **dict.fromkeys(("rope_theta", "original_max_position_embeddings"), _POSITIVE),
    **dict.fromkeys(("bos_token_id", "eos_token_id"), _TOKEN_IDS),
    **dict.fromkeys(
        ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_qk_norm", "use_sliding_window", "norm_topk_prob"),
        _FLAG,
    ),
    **dict.fromkeys(("architectures", "layer_types", "no_rope_layers", "moe_layers", "mlp_only_layers"), _LIST),
    **dict.fromkeys(
        ("rope_scaling", "rope_parameters", "text_config", "vision_config", "quantization_config"), _OBJECT
    ),
}


def check_values(config: Mapping[str, Any], file: str = "config.json") -> None:
    """Raises CheckpointError, naming ``file``, where a known name has a value of another kind. Others are not looked
    at."""
    for name, value in config.items():
        kind = _NEVER_NULL.get(name) or (None if value is None else _OR_NULL.get(name))
        if kind is not None and not kind.fits(value):
            raise CheckpointError(f"{file}: {name} is {_shown(value)}; it must be {kind.what}")


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


@contextmanager
def reading_config(architecture: str) -> Iterator[None]:
    """Around what reads config.json: what goes wrong there for want of a name, or for a value of a kind that nobody
    expects, becomes a CheckpointError."""
    try:
        yield
    except RemudaError:
        raise
    except KeyError as error:
        raise CheckpointError(f"config.json of {architecture} lacks {error.args[0]!r}") from error
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise CheckpointError(f"config.json of {architecture} is not as transformers writes it: {error}") from error
