"""Whole steps of a model of Llama-3.1-8B's shapes with random weights: decoding against a copy of memory, with and
without CUDA graphs, and prompts against a GEMM."""

from collections.abc import Iterator

import torch

from bench.gpu_model import GpuModel
from bench.gpu_roofs import DEVICE, GpuRoofs
from bench.measure import Row
from engine.batch import ForwardBatch
from engine.config import Dtype
from engine.executor.model_runner import CapturedSteps
from engine.kernels.sampling import most_likely
from engine.model_config import ModelConfig
from engine.weights.ledger import held_bytes

CONTEXT = 1024
BATCHES = (1, 8, 64, 256)
_PROMPT = 4096
_TOKEN_ID = 300


def run(num_repetitions: int, quick: bool) -> list[Row]:
    """``quick``: two layers."""
    config = ModelConfig.from_hf(
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
    model = GpuModel(
        config, None, Dtype.BFLOAT16, DEVICE, num_requests=max(BATCHES), max_len=max(CONTEXT + 16, _PROMPT)
    )
    roofs, captured = GpuRoofs(), model.capture()
    rows = list(_decode(model, roofs, "CUDA graph", captured, num_repetitions))
    rows += _decode(model, roofs, "single launches", None, num_repetitions)
    return [*rows, _prefill(model, roofs, num_repetitions)]


def _decode(
    model: GpuModel, roofs: GpuRoofs, how: str, captured: CapturedSteps | None, num_repetitions: int
) -> Iterator[Row]:
    config = model.config
    for count in BATCHES:
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
