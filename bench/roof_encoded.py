"""Products of few tokens by weights in quantized formats, on ``num_threads`` threads that each go through matrices of
their own, against reading memory: of the bytes that the format takes there.
"""

from dataclasses import replace

import torch

from bench.measure import Row
from bench.quantized_matrices import FORMATS, random_matrix
from bench.roof_kernels import Roofs, against_read, copies, open_roofs, tokens_case
from engine.kernels.encoded_linear import EncodedMatrix, can_decode, linear_encoded

NAMES = ("int4, groups of 128", "fp8", "NF4", "GGUF Q4_K", "GGUF Q6_K", "GGUF Q8_0")
TOKENS = (1, 8, 32)


def run(num_repetitions: int, quick: bool, num_threads: int) -> list[Row]:
    rows = []
    with open_roofs(quick, num_threads) as roofs:
        for name in NAMES:
            one = random_matrix(FORMATS[name]).encoded()
            assert one is not None
            if not can_decode(one):
                return []  # this CPU has no tile units: there is no kernel to measure
            rows += _products(roofs, name, one, num_repetitions)
    return rows


def _products(roofs: Roofs, name: str, one: EncodedMatrix, num_repetitions: int) -> list[Row]:
    matrices = [[_with(one, codes) for codes in stack] for stack in copies(roofs, one.codes)]
    gigabytes = roofs.num_threads * len(matrices[0]) * _num_bytes(one) / 1e9
    rows = []
    for num_tokens in TOKENS:
        hidden = torch.randn(num_tokens, one.num_inputs, dtype=torch.bfloat16)

        def work(thread: int, hidden: torch.Tensor = hidden) -> None:
            for matrix in matrices[thread]:
                linear_encoded(hidden, matrix)

        title = f"linear {name} [{len(one.codes)}, {one.num_inputs}]"
        rows.append(against_read(roofs, title, tokens_case(num_tokens), work, gigabytes, num_repetitions))
    return rows


def _with(one: EncodedMatrix, codes: torch.Tensor) -> EncodedMatrix:
    """The same with codes from elsewhere, and its own scales."""
    scales = None if one.scales is None else one.scales.detach().clone()
    return replace(one, codes=codes, scales=scales, zeros=None if one.zeros is None else one.zeros.detach().clone())


def _num_bytes(one: EncodedMatrix) -> int:
    return sum(tensor.nbytes for tensor in (one.codes, one.scales, one.zeros) if tensor is not None)
