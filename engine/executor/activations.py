"""How much memory the largest steps need besides weights and cache: a formula of shapes, so that a plan can know it.

Only one layer's tensors are alive at a time, so the need is that of the largest phase, each a sum of what is alive in
it (docs/plan.md has the same terms as a table). The largest steps are those that warm-up computes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from engine.config import Dtype, ParallelConfig
from engine.layer_config import LayerConfig, MoeConfig
from engine.model_config import ModelConfig, num_local_kv_heads

_MASK_BYTES = 2
"""A mask of one byte, and what it is made from."""
_FLOAT32_BYTES = 4
_SAMPLING_COPIES = 12
"""Of the logits in float32: 64-bit weights, and their sorted copies and sums where top-p must see them all."""
_TILE_QUERIES = 512
_GATHERED_POSITIONS = 32768
"""Bounds of engine.attention.reference: queries of one prefill tile, and positions that decoding gathers at once."""
_PIECE_POSITIONS = 16384
"""Bound of engine.attention.pieces: positions before a prompt's tile that are gathered at once."""
_ROW_NUMBERS_BYTES = 64
"""Where a row goes, comes from, and what is written beside it."""
_MATRIX_TILE_BYTES = 4 * 8 * 2**20
"""Of a quantized matrix that is converted tile by tile (engine.quantization.matrix): a tile and its copies."""


@dataclass(frozen=True)
class StepSize:
    """The largest steps: tokens of a prefill, requests that decode, and positions of the longest context."""

    num_tokens: int
    num_requests: int
    max_model_len: int


def activation_bytes(config: ModelConfig, parallel: ParallelConfig, step: StepSize, dtype: Dtype) -> int:
    """Most bytes that one step holds at once on a rank, its weights and cache not counted."""
    layers = set(config.layers)
    prefill = step.num_tokens * max(max(_phases(config, parallel, layer, dtype)) for layer in layers)
    prefill += _prefill_attention(config, parallel, step, dtype)
    decode = step.num_requests * max(max(_phases(config, parallel, layer, dtype)) for layer in layers)
    decode += _decode_attention(config, parallel, step, dtype)
    tile = _MATRIX_TILE_BYTES if config.quantization else 0
    return max(prefill, decode, _logits(config, step, dtype)) + tile


def input_bytes(step: StepSize, num_groups: int, block_size: int) -> int:
    """Bytes of what a step is given, 64-bit integers all: token ids and positions, and for each of ``num_groups`` KV
    groups the block tables and where each token's keys go."""
    tables = step.num_requests * -(-step.max_model_len // block_size)
    return 8 * (2 * step.num_tokens + num_groups * (step.num_tokens + tables))


def _phases(config: ModelConfig, parallel: ParallelConfig, layer: LayerConfig, dtype: Dtype) -> Iterator[int]:
    """Bytes per token of each phase of a layer, and of the angles of its rotation, which all layers share."""
    size, b = config.hidden_size, dtype.num_bytes
    copy = 0 if dtype is Dtype.FLOAT32 else _FLOAT32_BYTES
    angles = 2 * _FLOAT32_BYTES * config.head_dim
    # Norm: the residual; its copy in float32 and the quotient; the result.
    yield angles + size * (b + copy + _FLOAT32_BYTES + b)
    query = config.num_heads // parallel.tp * config.head_dim
    key = num_local_kv_heads(config, parallel) * config.head_dim
    # Attention: residual and normed input; q, k and v; queries and keys, turned; what turning needs, or the result
    # and its projection.
    turning = query * (3 * _FLOAT32_BYTES if config.rope.interleaved else b)
    yield angles + b * (2 * size + 2 * query + 3 * key) + max(turning, b * (query + size))
    if layer.moe is None:
        # Feed-forward: residual and normed input; gate and up; the factor of the gate; the product; or the result.
        width = layer.intermediate_size // parallel.tp
        yield angles + b * (2 * size + max(4 * width, width + size))
        return
    pairs = layer.moe.num_experts_per_token
    width = layer.moe.intermediate_size // parallel.expert_tp
    if parallel.exchanges_tokens:
        yield angles + 5 * b * size + _exchange(layer.moe, parallel, size, b, copy)
        return
    # Experts: residual, normed input, and the sum with what is added to it; inputs of all pairs; then either outputs
    # of all pairs and one expert's widths for at most all tokens, or the outputs twice and in float32 while they are
    # weighted.
    rows = b * size * pairs
    weighted = pairs * size * copy
    yield angles + 5 * b * size + rows + max(rows + b * (4 * width + size), 2 * rows + weighted)


def _exchange(moe: MoeConfig, parallel: ParallelConfig, size: int, b: int, copy: int) -> int:
    """Bytes per token where tokens come from all dp groups, as if all of them met at this rank's experts. ``copy``:
    bytes of a number's float32 copy, if it has one."""
    width = moe.intermediate_size // parallel.expert_tp
    chosen = moe.num_experts_per_token
    sent = -(-min(chosen, parallel.ep) * parallel.expert_tp // parallel.tp)
    sent_pairs = -(-chosen * parallel.expert_tp // parallel.tp)
    received, pairs = parallel.dp, parallel.dp * min(chosen, parallel.num_expert_slots(moe.num_experts))
    row, wide = b * size, _FLOAT32_BYTES * size
    numbers = _ROW_NUMBERS_BYTES * (sent_pairs + pairs + sent + received)
    # Rows gathered, and with their labels; rows on both sides; the received and each expert's input, weighted; inputs
    # and outputs, and one expert's widths for all tokens.
    posting = 2 * sent * row
    receiving = max(sent + received, received + pairs) * row + pairs * copy * size
    computing = 2 * pairs * row + parallel.dp * (4 * b * width + row)
    if parallel.is_deterministic:
        # Outputs in both orders; on both sides; those that came back twice, their sum.
        combining = max(2 * pairs, pairs + sent_pairs) * row + 2 * sent_pairs * row + 3 * wide
    else:
        # Outputs, also weighted, and their sums; sums on both sides; those that came back and their sum.
        combining = pairs * (row + wide) + received * (wide + row)
        combining = max(combining, (received + sent) * row, sent * (row + copy * size) + wide + row)
    return numbers + max(posting, receiving, computing, combining)


def _prefill_attention(config: ModelConfig, parallel: ParallelConfig, step: StepSize, dtype: Dtype) -> int:
    """Keys and values gathered from their pages, and one tile's mask and scores. A prompt's last chunk sees what chunks
    before it computed, piece by piece."""
    length = min(step.max_model_len, step.num_tokens)
    gathered = min(step.max_model_len, max(step.num_tokens, _PIECE_POSITIONS))
    key = num_local_kv_heads(config, parallel) * config.head_dim
    scores = min(_TILE_QUERIES, length) * length
    return 2 * gathered * key * dtype.num_bytes + scores * (_FLOAT32_BYTES + _MASK_BYTES)


def _decode_attention(config: ModelConfig, parallel: ParallelConfig, step: StepSize, dtype: Dtype) -> int:
    """Keys and values gathered from their pages, and an eighth of it for the operation itself."""
    positions = min(step.max_model_len * step.num_requests, _GATHERED_POSITIONS)
    key = num_local_kv_heads(config, parallel) * config.head_dim
    return 2 * positions * key * dtype.num_bytes * 9 // 8


def _logits(config: ModelConfig, step: StepSize, dtype: Dtype) -> int:
    """On the sampling rank: gathered in the activations' format, then in float32, and what sampling needs; the final
    hidden states are still there."""
    row = config.vocab_size * (dtype.num_bytes + _FLOAT32_BYTES * _SAMPLING_COPIES)
    return step.num_requests * row + 2 * step.num_requests * config.hidden_size * dtype.num_bytes
