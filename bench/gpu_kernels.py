"""Kernels of the CUDA path by themselves: bound by memory against a copy, bound by products against a GEMM."""

from collections.abc import Callable, Iterator

import torch

from bench.gpu_roofs import DEVICE, GpuRoofs
from bench.measure import Row
from engine.attention.backend import AttentionBackend, KvCacheView
from engine.attention.registry import attention_backend
from engine.batch import ForwardBatch
from engine.config import KvGroupConfig
from engine.kernels.elementwise import add_rms_norm, silu_multiply
from engine.kernels.gpu_experts import gpu_experts
from engine.kernels.sampling import most_likely
from engine.quantization.fp8 import multiply_float8, quantize_rows

BLOCK_SIZE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 16, 32, 8, 128
_FULL = (KvGroupConfig((0,)),)
_EXPERTS = {"16 of 5120 × 8192": (16, 5120, 8192, 1), "128 of 2048 × 768": (128, 2048, 768, 8)}
"""Scout's and Qwen3-30B's: experts, hidden size, width, experts per token."""


@torch.inference_mode()
def run(num_repetitions: int, quick: bool) -> list[Row]:
    roofs = GpuRoofs()
    rows = []
    for name in ("cuda", "flashinfer"):
        backend = _backend(name)
        if backend is not None:
            rows += list(_decode_attention(roofs, name, backend, num_repetitions, quick))
            rows += list(_prefill_attention(roofs, name, backend, num_repetitions, quick))
    rows += list(_experts(roofs, num_repetitions, quick))
    rows += list(_elementwise(roofs, num_repetitions))
    return [*rows, _float8(roofs, num_repetitions)]


def _backend(name: str) -> AttentionBackend | None:
    """None where its package is not installed."""
    try:
        return attention_backend(name=name)
    except ModuleNotFoundError:
        return None


def attention_step(work: list[tuple[int, int]]) -> tuple[ForwardBatch, KvCacheView]:
    """Of requests with so many positions before the step and so many in it; a cache with random contents."""
    ends = [start + count for start, count in work]
    width = max(-(-end // BLOCK_SIZE) for end in ends)
    num_blocks = 1 + width * len(work)
    tables = (torch.randperm(num_blocks - 1, device=DEVICE) + 1).view(len(work), width)
    positions = torch.cat([torch.arange(start, start + count, device=DEVICE) for start, count in work])
    requests = torch.arange(len(work), device=DEVICE).repeat_interleave(
        torch.tensor([count for _, count in work], device=DEVICE)
    )
    slots = tables[requests, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    shape = (num_blocks, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    cache = [torch.randn(shape, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
    counts = tuple(count for _, count in work)
    batch = ForwardBatch(positions, positions, counts, tuple(ends), (tables,), (slots,), positions[:0])
    return batch, KvCacheView((cache[0],), (cache[1],))


def _attention(backend: AttentionBackend, work: list[tuple[int, int]]) -> Callable[[], object]:
    batch, cache = attention_step(work)
    num_tokens = len(batch.positions)
    query = torch.randn(num_tokens, NUM_HEADS, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE)
    key, value = (
        torch.randn(num_tokens, NUM_KV_HEADS, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)
    )
    step = backend.plan(batch, _FULL, BLOCK_SIZE)
    return lambda: step.forward(0, query, key, value, cache)


def _decode_attention(
    roofs: GpuRoofs, name: str, backend: AttentionBackend, num_repetitions: int, quick: bool
) -> Iterator[Row]:
    context = 1024 if quick else 8192
    for batch in (1, 16, 64, 256):
        num_bytes = 2 * batch * context * NUM_KV_HEADS * HEAD_DIM * 2
        work = _attention(backend, [(context - 1, 1)] * batch)
        yield roofs.against_copy(
            f"decode attention, {name}", f"{batch} × {context} positions", work, num_bytes, num_repetitions
        )


def _prefill_attention(
    roofs: GpuRoofs, name: str, backend: AttentionBackend, num_repetitions: int, quick: bool
) -> Iterator[Row]:
    for before, count in ((0, 1024),) if quick else ((0, 2048), (0, 8192), (24576, 8192)):
        num_pairs = count * before + count * (count + 1) // 2
        work = _attention(backend, [(before, count)])
        num_flops = 4 * num_pairs * NUM_HEADS * HEAD_DIM
        case = f"{count} tokens after {before}"
        yield roofs.against_gemm(f"prefill attention, {name}", case, work, num_flops, num_repetitions)


def _experts(roofs: GpuRoofs, num_repetitions: int, quick: bool) -> Iterator[Row]:
    for name, (num_experts, size, width, num_choices) in _EXPERTS.items():
        gate_up = torch.randn(num_experts, 2 * width, size, dtype=torch.bfloat16, device=DEVICE) / size**0.5
        down = torch.randn(num_experts, size, width, dtype=torch.bfloat16, device=DEVICE) / width**0.5
        for num_tokens in (1, 8, 32, 512, 4096)[: 3 if quick else None]:
            hidden = torch.randn(num_tokens, size, dtype=torch.bfloat16, device=DEVICE)
            ids = torch.rand(num_tokens, num_experts, device=DEVICE).topk(num_choices).indices
            scores = torch.rand(num_tokens, num_choices, device=DEVICE)

            def work(
                hidden: torch.Tensor = hidden,
                ids: torch.Tensor = ids,
                scores: torch.Tensor = scores,
                gate_up: torch.Tensor = gate_up,
                down: torch.Tensor = down,
            ) -> object:
                return gpu_experts(hidden, ids, scores, gate_up, down, 0, scales_inputs=False)

            case = f"{name}, {num_tokens} × {num_choices}"
            if num_tokens >= 512:
                num_flops = 2 * num_tokens * num_choices * 3 * size * width
                yield roofs.against_gemm("experts", case, work, num_flops, num_repetitions)
            else:
                num_bytes = len(ids.unique()) * 3 * size * width * 2
                yield roofs.against_copy("experts", case, work, num_bytes, num_repetitions)


def _elementwise(roofs: GpuRoofs, num_repetitions: int) -> Iterator[Row]:
    hidden, update = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    weight = torch.ones(8192, dtype=torch.bfloat16, device=DEVICE)
    cases: dict[str, tuple[Callable[[], object], int]] = {
        "add and norm": (lambda: add_rms_norm(hidden, update, weight, 1e-5), 4 * hidden.nbytes),
        "SwiGLU": (lambda: silu_multiply(hidden), hidden.nbytes * 3 // 2),
    }
    logits = torch.randn(256, 128256, device=DEVICE)
    cases["most likely token"] = (lambda: most_likely(logits), logits.nbytes)
    for case, (work, num_bytes) in cases.items():
        yield roofs.against_copy("elementwise", case, work, num_bytes, num_repetitions)


def _float8(roofs: GpuRoofs, num_repetitions: int) -> Row:
    """With the rounding of activations, which a step pays too."""
    size = 8192
    hidden = torch.randn(size, size, dtype=torch.bfloat16, device=DEVICE)
    codes, scales = quantize_rows(torch.randn(size, size, device=DEVICE))

    def work() -> object:
        return multiply_float8(hidden, codes, scales)

    return roofs.against_gemm("FP8 product", f"{size} tokens", work, 2 * size**3, num_repetitions)
