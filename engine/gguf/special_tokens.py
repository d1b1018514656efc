"""Which tokens end a sequence, as a GGUF file's metadata says. Torch-free."""

from collections.abc import Mapping
from typing import Any

_STOP_KEYS = ("eos", "eot", "eom")
_STOP_NAMES = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|im_end|>", "<|endoftext|>")
"""Of Llama 3 and Qwen 3, whose files name one id where the original checkpoint has several."""
CONTROL = 3
"""The type of a control token in ``tokenizer.ggml.token_type``."""


def token_id(metadata: Mapping[str, Any], name: str) -> int | None:
    """``tokenizer.ggml.<name>_token_id``."""
    value = metadata.get(f"tokenizer.ggml.{name}_token_id")
    return None if value is None else int(value)


def stop_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """The end-of-sequence id first, then the others that end a turn."""
    named = [token_id(metadata, key) for key in _STOP_KEYS]
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    kinds = metadata.get("tokenizer.ggml.token_type") or []
    known = [
        number
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=False))
        if kind == CONTROL and token in _STOP_NAMES
    ]
    return tuple(dict.fromkeys([number for number in named if number is not None] + known))
