"""GGUF's names of tensors in Hugging Face's words, which are those that the models ask for."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from engine.errors import CheckpointError
from engine.gguf.block_types import BLOCK_TYPES, type_name
from engine.gguf.header import GgufHeader, GgufTensor

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_MIXTRAL = {"router": "block_sparse_moe.gate", "experts": "block_sparse_moe.experts"}
_MIXTRAL_MATRICES = {"gate": "w1", "up": "w3", "down": "w2"}
_QWEN = {"router": "mlp.gate", "experts": "mlp.experts"}
_QWEN_MATRICES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}

_LAYER = re.compile(r"blk\.(\d+)\.(.+)")
_STACKED = re.compile(r"ffn_(gate|up|down)_exps")
_SINGLE = re.compile(r"ffn_(gate|up|down)\.(\d+)")
"""Before 2024-04, an expert's matrix stood by itself."""
_UNUSED = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd\.weight")
"""Frequencies are the configuration's; see engine.gguf.model."""


@dataclass(frozen=True)
class NamedTensor:
    """A tensor, or one expert's part of it. ``paired_rows``: rows of a head, where they stand in the order of Meta's
    originals (see engine.weights.gguf_checkpoint); else 0."""

    tensor: GgufTensor
    expert: int | None = None
    paired_rows: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """In weights."""
        return self.tensor.shape if self.expert is None else self.tensor.shape[1:]


def named_tensors(header: GgufHeader, architecture: str, head_dim: int) -> dict[str, NamedTensor]:
    """All tensors of the model, by Hugging Face's names.

    Raises CheckpointError for a tensor that ``architecture`` (GGUF's name) is not known to have, or in a format that
    is not served.
    """
    found: dict[str, NamedTensor] = {}
    for tensor in header.tensors.values():
        if _UNUSED.fullmatch(tensor.name):
            continue
        if tensor.type_number not in BLOCK_TYPES:
            served = ", ".join(kind.name for kind in BLOCK_TYPES.values())
            raise CheckpointError(
                f"{header.path}: tensor {tensor.name!r} is in {type_name(tensor.type_number)}, which is not served; "
                f"take a file of this model in Q8_0 or Q4_K_M (served are {served})"
            )
        for name, part in _named(header, tensor, architecture, head_dim):
            found[name] = part
    return found


def _named(
    header: GgufHeader, tensor: GgufTensor, architecture: str, head_dim: int
) -> Iterator[tuple[str, NamedTensor]]:
    module, _, kind = tensor.name.rpartition(".")
    if module in _TOP and kind == "weight":
        yield f"{_TOP[module]}.{kind}", NamedTensor(tensor)
        return
    match = _LAYER.fullmatch(module)
    if match is None or kind not in ("weight", "bias"):
        raise _unknown(header, tensor, architecture)
    layer, module = f"model.layers.{match[1]}", match[2]
    if module in _IN_LAYER:
        is_paired = architecture == "llama" and module in ("attn_q", "attn_k")
        yield f"{layer}.{_IN_LAYER[module]}.{kind}", NamedTensor(tensor, None, head_dim if is_paired else 0)
        return
    names, matrices = (_MIXTRAL, _MIXTRAL_MATRICES) if architecture == "llama" else (_QWEN, _QWEN_MATRICES)
    experts = f"{layer}.{names['experts']}"
    if module == "ffn_gate_inp" and kind == "weight":
        yield f"{layer}.{names['router']}.{kind}", NamedTensor(tensor)
    elif (stacked := _STACKED.fullmatch(module)) and len(tensor.shape) == 3 and kind == "weight":
        for expert in range(tensor.shape[0]):
            yield f"{experts}.{expert}.{matrices[stacked[1]]}.{kind}", NamedTensor(tensor, expert)
    elif (single := _SINGLE.fullmatch(module)) and kind == "weight":
        yield f"{experts}.{single[2]}.{matrices[single[1]]}.{kind}", NamedTensor(tensor)
    else:
        raise _unknown(header, tensor, architecture)


def _unknown(header: GgufHeader, tensor: GgufTensor, architecture: str) -> CheckpointError:
    return CheckpointError(
        f"{header.path} has a tensor {tensor.name!r}, which is not known of the architecture {architecture!r}; "
        "such a model is not served"
    )


def quantized_modules(tensors: Mapping[str, NamedTensor]) -> dict[str, str]:
    """Of the quantized tensors: name without ``.weight`` to the name of the format."""
    return {
        name.removesuffix(".weight"): part.tensor.type.name
        for name, part in tensors.items()
        if part.tensor.type.is_quantized
    }
