"""What only a GPU can show, each against something that does not use it: the largest error, and what it may be."""

import importlib.util
from collections.abc import Callable
from functools import partial

import torch

from bench.gpu_kernels import attention_step
from bench.gpu_model import CacheShape, GpuModel
from bench.gpu_roofs import DEVICE
from bench.gpu_serving import CASES, DEPTHS, GANGS, TINY, check_gang, check_served
from engine.attention.registry import attention_backend
from engine.config import Dtype, KvGroupConfig, ParallelConfig
from engine.executor.sampler import sample
from engine.executor.sampling_row import SamplingRow
from engine.layer_config import LayerConfig
from engine.model_config import ModelConfig
from engine.quantization.fp8 import multiply_float8, quantize_rows
from engine.request import SamplingParams
from engine.rope_config import RopeConfig

Check = Callable[[], tuple[float, float]]
_CPU = torch.device("cpu")
_PROMPTS = [list(range(5, 205)), [7, 300, 9], list(range(400, 433))]
_LARGEST_PROMPT = 256


class NotChecked(Exception):
    """This machine lacks what the check is about; the message says what."""


def _tiny(dtype: Dtype, device: torch.device) -> GpuModel:
    config = ModelConfig.from_directory(TINY)
    return GpuModel(config, str(TINY), dtype, device, shapes=[CacheShape(len(_PROMPTS), _LARGEST_PROMPT)])


def _tiny_logits(model: GpuModel, *, is_captured: bool = False) -> torch.Tensor:
    """Of prompts, of prompts continued together with decoding, and of a step that only decodes."""
    lengths = [len(prompt) for prompt in _PROMPTS]
    captured = model.capture() if is_captured else None
    steps = [
        model.batch([0, 0, 0], _PROMPTS),
        model.batch(lengths, [[11, 12, 13], [14], [15]]),
        model.batch([lengths[0] + 3, lengths[1] + 1, lengths[2] + 1], [[16], [17], [18]]),
    ]
    return torch.cat([model.logits(step, captured).cpu() for step in steps])


def _worst(found: torch.Tensor, expected: torch.Tensor) -> float:
    """As a share of the largest number."""
    expected = expected.double().cpu()
    error = (found.double().cpu() - expected).abs().max() / expected.abs().max()
    return float(error)


def _model_float32() -> tuple[float, float]:
    return _worst(_tiny_logits(_tiny(Dtype.FLOAT32, DEVICE)), _tiny_logits(_tiny(Dtype.FLOAT32, _CPU))), 1e-3


def _model_bfloat16() -> tuple[float, float]:
    return _worst(_tiny_logits(_tiny(Dtype.BFLOAT16, DEVICE)), _tiny_logits(_tiny(Dtype.FLOAT32, _CPU))), 0.1


def _graphs() -> tuple[float, float]:
    model = _tiny(Dtype.BFLOAT16, DEVICE)
    return _worst(_tiny_logits(model, is_captured=True), _tiny_logits(model)), 0.02


_MIXED = [(6000, 700), (9000, 1), (20, 1), (0, 3000)]
_DECODES = [(9000, 1), (20, 1), (511, 1)]
"""Of each request: positions before the step, and in it."""


def _long_attention(name: str, group: KvGroupConfig, work: list[tuple[int, int]]) -> Check:
    """Prompts after a long past, decoding requests of many parts, against the reference in float32."""

    def check() -> tuple[float, float]:
        _require_installed(name)
        batch, cache = attention_step(work)
        num_tokens = len(batch.positions)
        query = torch.randn(num_tokens, 32, 128, dtype=torch.bfloat16, device=DEVICE)
        key, value = (torch.randn(num_tokens, 8, 128, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
        found = attention_backend(name=name).plan(batch, (group,), 16).forward(0, query, key, value, cache)
        wide = type(cache)(tuple(t.float() for t in cache.key_cache), tuple(t.float() for t in cache.value_cache))
        reference = attention_backend(name="reference").plan(batch, (group,), 16)
        return _worst(found, reference.forward(0, query.float(), key.float(), value.float(), wide)), 0.02

    return check


def _require_installed(name: str) -> None:
    if name == "flashinfer" and importlib.util.find_spec(name) is None:
        raise NotChecked("FlashInfer is not installed (pip install flashinfer-python)")


def _flashinfer_steps() -> tuple[float, float]:
    _require_installed("flashinfer")
    return whole_steps("flashinfer", "cuda", DEVICE)


def whole_steps(name: str, other: str, device: torch.device) -> tuple[float, float]:
    """Of a model with random weights and heads of 128 numbers (which FlashInfer has kernels for), prompts, a mixed step
    and one that decodes, by two kinds of attention."""
    rope = RopeConfig(theta=10000.0, head_dim=128, original_max_positions=1000)
    config = ModelConfig("LlamaForCausalLM", 512, 512, 4, 2, 128, (LayerConfig(512),) * 2, rope, 1e-5, 1000)
    model = GpuModel(config, None, Dtype.BFLOAT16, device, shapes=[CacheShape(len(_PROMPTS), _LARGEST_PROMPT)])
    model.attention = attention_backend(device, other)
    expected = _tiny_logits(model)
    model.attention = attention_backend(device, name)
    return _worst(_tiny_logits(model), expected), 0.02


def _float8() -> tuple[float, float]:
    """Against float64 products of the same codes."""
    if torch.cuda.get_device_capability(DEVICE) < (9, 0):
        raise NotChecked("products in FP8 want Hopper or later")
    codes, scales = quantize_rows(torch.randn(512, 1024, device=DEVICE))
    hidden = torch.randn(33, 1024, dtype=torch.bfloat16, device=DEVICE)
    inputs, input_scales = quantize_rows(hidden)
    expected = (inputs.double() * input_scales) @ (codes.double() * scales).t()
    return _worst(multiply_float8(hidden, codes, scales), expected), 0.01


def _draws() -> tuple[float, float]:
    """Share of tokens that differ from the CPU's: exponentials may differ in their last bit."""
    logits = torch.randn(512, 128256) * 4
    rows = [
        SamplingRow(r, SamplingParams(max_tokens=1, temperature=0.7 * (r % 3), top_p=0.9, seed=r), [1], 1)
        for r in range(len(logits))
    ]
    found, expected = sample(logits.to(DEVICE), rows), sample(logits, rows)
    different = sum(a != b for a, b in zip(found.token_ids, expected.token_ids, strict=True))
    return different / len(rows), 0.005


def _gang(layout: ParallelConfig) -> tuple[float, float]:
    if (num_gpus := torch.cuda.device_count()) < layout.num_ranks:
        raise NotChecked(f"NCCL between {layout.num_ranks} ranks wants as many GPUs; there is {num_gpus}")
    return check_gang(layout, "cuda")


_GROUPS = {
    "full": KvGroupConfig((0,)),
    "chunked": KvGroupConfig((0,), chunk_size=2048),
    "sliding": KvGroupConfig((0,), window_size=1024),
}
CHECKS: dict[str, Check] = {
    "remuda-tiny, float32, against the CPU": _model_float32,
    "remuda-tiny, bfloat16, against the CPU in float32": _model_bfloat16,
    "CUDA graphs against single launches": _graphs,
    **{
        f"long {kind} attention, {what}, {label}": _long_attention(name, group, work)
        for name, label in (("cuda", "Triton"), ("flashinfer", "FlashInfer"))
        for kind, group in _GROUPS.items()
        for what, work in (("prompts and decoding", _MIXED), ("decoding alone", _DECODES))
    },
    "FlashInfer in whole steps against Triton": _flashinfer_steps,
    "FP8 products against float64": _float8,
    "drawn tokens against the CPU": _draws,
    **{
        f"served, {case.name}, {depth} in flight, against the CPU": partial(check_served, case, depth, "cuda")
        for case in CASES
        for depth in DEPTHS
    },
    **{f"served over NCCL, {layout.product}, against the CPU": partial(_gang, layout) for layout in GANGS},
}
