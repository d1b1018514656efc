"""How long a layer's product takes in each format of weights: ``python -m bench.quantized_matrices``.

Random matrices [4096, 4096], bfloat16 activations, one thread. Each figure is the fastest of several runs, in turn with
the same product by bfloat16 weights, and given as a ratio to it. Each run takes another of so many copies of the matrix
that it comes from memory, as a model's do, and not from the CPU's cache.
"""

import argparse
import copy
import itertools
import math
import time
from collections.abc import Iterator

import torch

from engine.gguf.block_types import QUANTIZED_TYPES
from engine.parallel.mesh import Mesh
from engine.parameter import ParameterBuilder
from engine.quantization.matrix import MatrixPart, WeightMatrix
from engine.quantization.registry import make_matrix
from engine.quantization_config import MatrixFormat, QuantizationConfig, WeightFormat
from engine.weights.dummy import fill_with_random_values

SIZE = 4096
CACHE_BYTES = 2**29
TOKENS = (1, 8, 32, 128, 256, 1024)
FORMATS = {
    "int8": MatrixFormat(WeightFormat.INT8, rounds_inputs=True),
    "int8, activations as they are": MatrixFormat(WeightFormat.INT8),
    "fp8": MatrixFormat(WeightFormat.FP8),
    "fp8, blocks of 128 × 128": MatrixFormat(WeightFormat.FP8_BLOCKS),
    "int4, groups of 128": MatrixFormat(WeightFormat.INT4, group_size=128),
    "int4, groups of 32": MatrixFormat(WeightFormat.INT4, group_size=32),
    "NF4": MatrixFormat(WeightFormat.NF4, group_size=64),
    **{f"GGUF {name}": MatrixFormat(WeightFormat.GGUF, gguf_type=name) for name in QUANTIZED_TYPES},
}


def random_matrices(form: MatrixFormat | None) -> list[WeightMatrix]:
    """Copies of one, together larger than the cache."""
    matrix = random_matrix(form)
    num_bytes = sum(parameter.nbytes for parameter in matrix.parameters())
    return [matrix, *(copy.deepcopy(matrix) for _ in range(CACHE_BYTES // num_bytes))]


def random_matrix(form: MatrixFormat | None) -> WeightMatrix:
    rules = () if form is None else ((("Linear",), form),)
    config = QuantizationConfig("", rules)
    build = ParameterBuilder(Mesh(), torch.bfloat16, torch.device("cpu"), quantization=config)
    matrix = make_matrix(build, [MatrixPart("matrix", SIZE, SIZE)])
    fill_with_random_values(build.slices, build.conversions, lambda done, total: None)
    return matrix


def compare(
    first: Iterator[WeightMatrix], second: Iterator[WeightMatrix], hidden: torch.Tensor, repetitions: int
) -> tuple[float, float]:
    """Milliseconds of the fastest product by each, taken in turn."""
    best = [math.inf, math.inf]
    for _ in range(repetitions):
        for number, matrix in enumerate((next(first), next(second))):
            began = time.perf_counter()
            matrix.forward(hidden)
            best[number] = min(best[number], (time.perf_counter() - began) * 1e3)
    return best[0], best[1]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=10)
    repetitions = parser.parse_args().repetitions
    torch.set_num_threads(1)
    dense = itertools.cycle(random_matrices(None))
    print("| weights | " + " | ".join(f"T = {count}" for count in TOKENS) + " |")
    print("|---" * (1 + len(TOKENS)) + "|")
    for name, form in FORMATS.items():
        matrices = itertools.cycle(random_matrices(form))
        cells = []
        for count in TOKENS:
            hidden = torch.randn(count, SIZE).bfloat16()
            ours, reference = compare(matrices, dense, hidden, repetitions)
            cells.append(f"{ours / reference:.2f} ({ours:.2f} ms)")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
