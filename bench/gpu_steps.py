"""Whole steps of a model of Llama-3.1-8B's shapes with random weights: decoding against a copy of memory, with and
without CUDA graphs, and prompts against a GEMM."""

from collections.abc import Callable, Iterator, Sequence

import torch

from bench.gpu_model import CacheShape, GpuModel, cache_bytes
from bench.gpu_roofs import DEVICE, GpuRoofs
from bench.measure import Row
from engine.batch import ForwardBatch
from engine.config import Dtype, ParallelConfig
from engine.executor.model_runner import CapturedSteps
from engine.kernels.sampling import most_likely
from engine.model_config import ModelConfig
from engine.weights.ledger import held_bytes, shard_bytes

CONTEXT = 1024
BATCHES = (1, 8, 64, 256)
_PROMPT = 4096
_TOKEN_ID = 300
_RESERVED_BYTES = 8 * 2**30
"""For the ceilings' matrices (4.5 GiB), activations, graphs and libraries' workspaces."""


def model_config(quick: bool) -> ModelConfig:
    """``quick``: two layers."""
    return ModelConfig.from_hf(
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 2 if quick else 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }
    )


def shapes(num_requests: int) -> list[CacheShape]:
    """So many requests that decode, and the prompt."""
    return [CacheShape(num_requests, CONTEXT + 16), CacheShape(1, _PROMPT)]


def fitting_batches(config: ModelConfig, free_bytes: int) -> list[int]:
    """Those of ``BATCHES`` for which weights, cache and ceilings fit into so much of the GPU's memory."""
    others = shard_bytes(config, ParallelConfig(), 0, Dtype.BFLOAT16).total + _RESERVED_BYTES
    return [count for count in BATCHES if others + cache_bytes(config, shapes(count), Dtype.BFLOAT16) <= free_bytes]


def run(num_repetitions: int, quick: bool, say: Callable[[str], None]) -> Iterator[Row]:
    """``say``: is told what does not fit into the GPU's memory, and is left out."""
    config = model_config(quick)
    torch.cuda.empty_cache()
    free_bytes, _ = torch.cuda.mem_get_info(DEVICE)
    batches = fitting_batches(config, free_bytes)
    if left_out := [count for count in BATCHES if count not in batches]:
        say(f"steps with {', '.join(map(str, left_out))} requests: not with {free_bytes / 1e9:.1f} GB of free memory")
    if not batches:
        return
    model = GpuModel(config, None, Dtype.BFLOAT16, DEVICE, shapes=shapes(max(batches)))
    roofs, captured = GpuRoofs(), model.capture()
    yield from _decode(model, roofs, batches, "CUDA graph", captured, num_repetitions)
    yield from _decode(model, roofs, batches, "single launches", None, num_repetitions)
    yield _prefill(model, roofs, num_repetitions)


def _decode(
    model: GpuModel,
    roofs: GpuRoofs,
    batches: Sequence[int],
    how: str,
    captured: CapturedSteps | None,
    num_repetitions: int,
) -> Iterator[Row]:
    config = model.config
    for count in batches:
        batch = model.batch([CONTEXT - 1] * count, [[_TOKEN_ID]] * count)
        kv_bytes = 2 * count * CONTEXT * len(config.layers) * config.num_kv_heads * config.head_dim * 2

        def work(batch: ForwardBatch = batch) -> object:
            return most_likely(model.logits(batch, captured))

        num_bytes = _weight_bytes(model) + kv_bytes
        case = f"{count} × 1 token at {CONTEXT}, {how}"
        yield roofs.against_copy("decode step", case, work, num_bytes, num_repetitions)


def _prefill(model: GpuModel, roofs: GpuRoofs, num_repetitions: int) -> Row:
    config = model.config
    batch = model.batch([0], [[_TOKEN_ID] * _PROMPT])
    matrices = sum(
        config.hidden_size * config.head_dim * 2 * (config.num_heads + config.num_kv_heads)
        + 3 * config.hidden_size * layer.intermediate_size
        for layer in config.layers
    )
    scores = len(config.layers) * 2 * config.num_heads * config.head_dim * _PROMPT * (_PROMPT + 1) // 2
    num_flops = 2 * (matrices * _PROMPT + scores)
    case = f"{_PROMPT} tokens"
    return roofs.against_gemm("prefill step", case, lambda: model.logits(batch), num_flops, num_repetitions)


def _weight_bytes(model: GpuModel) -> int:
    """That a decoding step reads: all but the embedding, of which it takes a few rows."""
    module = model.model
    assert isinstance(module, torch.nn.Module)
    held = held_bytes(module)
    return held.total - held.by_kind["embedding"]
