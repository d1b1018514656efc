"""Compiles every kernel for NVIDIA's Hopper, which takes no GPU; ends with the first error. Run by test_compiles.py in
a process of its own, for the interpreter must be off. The constants are those of Llama's and Llama 4's shapes."""

from typing import Any

import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from engine.kernels.triton import (
    decode_attention,
    fixed_linear,
    greedy,
    nucleus_border,
    rms_norm,
    rotate_and_write,
    routed_experts,
    silu_multiply,
)

HOPPER = GPUTarget("cuda", 90, 32)
BF16, FP32, INT64, NUMBER = "*bf16", "*fp32", "*i64", "i32"


def check(kernel: Any, types: list[str], constants: dict[str, Any], **options: int) -> None:
    """``types``: of the arguments that are no ``constants``, in order."""
    names, remaining = kernel.arg_names, iter(types)
    signature = {name: "constexpr" if name in constants else next(remaining) for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    compile(ASTSource(kernel, signature, values), target=HOPPER, options=options)
    print(kernel.__name__, flush=True)


def main() -> None:
    row = {"HAS_WEIGHT": True, "BLOCK": 8192}
    check(rms_norm._rms_norm, [BF16] * 3 + [NUMBER] * 4 + ["fp32"], row, num_warps=16)
    head: dict[str, Any] = {"weight": None, "rows_per_token": 1, "HAS_WEIGHT": False, "BLOCK": 128}
    check(rms_norm._rms_norm, [BF16] * 2 + [NUMBER] * 3 + ["fp32"], head, num_warps=1)
    check(rms_norm._add_rms_norm, [BF16] * 5 + [NUMBER, "fp32"], row, num_warps=16)
    check(silu_multiply._silu_multiply, [BF16, BF16, NUMBER], {"BLOCK": 1024})
    tile = {"HEAD_DIM": 128, "HEADS": 16, "HALF": 64}
    check(rotate_and_write._rotate, [BF16, BF16, FP32, FP32, NUMBER, NUMBER], tile | {"INTERLEAVED": True})
    for rotates, interleaved in ((True, False), (True, True), (False, False)):
        angles = [FP32 if rotates else INT64] * 2
        kind = {"ROTATES": rotates, "INTERLEAVED": interleaved}
        types = [BF16] * 6 + [INT64, *angles] + [NUMBER] * 7
        check(rotate_and_write._rotate_and_write, types, tile | kind)
    for chunk, window, parts in ((0, 0, 1), (8192, 0, 4), (0, 4096, 33)):
        for tensor, dot in ((BF16, tl.bfloat16), (FP32, tl.float32)):
            types = [tensor] * 3 + [INT64] * 4 + [FP32, FP32, NUMBER, "fp32"]
            sizes = {"BLOCK_SIZE": 16, "CHUNK": chunk, "WINDOW": window, "HEADS": 32, "GROUP": 4, "GROUP_ROWS": 16}
            sizes |= {"HEAD_DIM": 128, "WIDTH": 128, "POSITIONS": 64, "PARTS": parts}
            check(decode_attention._attend_part, types, sizes | {"DOT": dot}, num_warps=4, num_stages=2)
    sizes = {"HEADS": 32, "HEAD_DIM": 128, "WIDTH": 128, "PARTS": 33, "PARTS_ROWS": 64}
    check(decode_attention._combine_parts, [FP32, FP32, INT64, BF16], sizes, num_warps=4)
    for by_pair, scales in ((True, True), (False, False)):
        sizes = {"SCALES": scales, "BY_PAIR": by_pair, "PAIRS": 64, "TOKENS": 16, "OUTPUTS": 32, "INPUTS": 128}
        for kernel in (routed_experts._gate_up, routed_experts._down):
            types = [BF16, INT64, FP32, BF16, BF16] + [NUMBER] * 6
            check(kernel, types, sizes | {"DOT": tl.bfloat16}, num_warps=4, num_stages=3)
            # Numbers that are one become constants.
            ones = {"num_pairs": 1, "num_choices": 1, "DOT": tl.bfloat16}
            check(kernel, types[:-2], sizes | ones, num_warps=4, num_stages=3)
    for tensor, dot in ((BF16, tl.bfloat16), (FP32, tl.float32)):
        sizes = {"DOT": dot, "ROWS": 32, "COLUMNS": 64, "INPUTS": 64}
        check(fixed_linear._fixed_linear, [tensor] * 3 + [NUMBER] * 3, sizes)
    check(greedy._greedy, [FP32, INT64, NUMBER], {"BLOCK": 4096}, num_warps=8)
    types = [INT64, "*fp64", INT64, NUMBER, NUMBER]
    check(nucleus_border._nucleus_border, types, {"BLOCK": 2048, "BITS": 3})


if __name__ == "__main__":
    main()
