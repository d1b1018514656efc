"""What this machine can do: memory bandwidth and matrix products, the ceilings that other figures are divided by.

    python -m bench.limits [--quick] [--threads 2] [--out limits.json]

Reading is measured by a small C++ loop over buffers larger than a cache (a C++ compiler is needed); products by torch
over a rotating set of weights, so that M=1 shows streaming from memory. Each figure is a median with its spread.
"""

import argparse
import ctypes
import json
import mmap
import os
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

GIB = 1 << 30
WEIGHT_SET_BYTES = GIB
LINE_BYTES = 64

# Vectors of 64 bytes: the compiler maps them to what the machine has.
KERNEL_SOURCE = r"""
#include <cstddef>
#include <cstring>
#include <cstdint>
typedef uint64_t line __attribute__((vector_size(64)));
extern "C" uint64_t read_lines(const line* from, size_t num_lines) {
  line sum[8] = {};
  for (size_t i = 0; i + 8 <= num_lines; i += 8)
    for (int j = 0; j < 8; ++j) sum[j] ^= from[i + j];
  for (int j = 1; j < 8; ++j) sum[0] ^= sum[j];
  uint64_t all = 0;
  for (int j = 0; j < 8; ++j) all ^= sum[0][j];
  return all;
}
extern "C" void copy_lines(const line* from, line* to, size_t num_lines) { memcpy(to, from, num_lines * sizeof(line)); }
"""


@dataclass(frozen=True)
class Figure:
    """A measured rate with its spread over repetitions."""

    unit: str
    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, unit: str, values: list[float]) -> "Figure":
        return cls(unit, statistics.median(values), min(values), max(values))


class MemoryLimits:
    """Bandwidth of plain reads and copies with several threads, each on its own part of the buffers."""

    def __init__(self, num_threads: int, num_bytes: int, num_repetitions: int, huge_pages: bool = False) -> None:
        self._library = _compiled_kernels()
        self._num_threads = num_threads
        self._num_repetitions = num_repetitions
        self._lines_per_thread = num_bytes // LINE_BYTES // num_threads
        self._source = memory_buffer(num_bytes, huge_pages)

    def read(self) -> Figure:
        def part(offset: int) -> None:
            self._library.read_lines(self._source.ctypes.data + offset, self._lines_per_thread)

        return self._measure(part, bytes_per_line=LINE_BYTES)

    def copy(self) -> Figure:
        """Bytes read plus bytes written."""
        target_buffer = memory_buffer(self._source.nbytes)

        def part(offset: int) -> None:
            source, target = self._source.ctypes.data + offset, target_buffer.ctypes.data + offset
            self._library.copy_lines(source, target, self._lines_per_thread)

        return self._measure(part, bytes_per_line=2 * LINE_BYTES)

    def _measure(self, part: Callable[[int], None], bytes_per_line: int) -> Figure:
        offsets = [i * self._lines_per_thread * LINE_BYTES for i in range(self._num_threads)]
        moved = bytes_per_line * self._lines_per_thread * self._num_threads
        seconds = [run_together(part, offsets) for _ in range(self._num_repetitions)]
        return Figure.of("GB/s", [moved / each / 1e9 for each in seconds])


def gemm(dtype: torch.dtype, num_rows: int, num_repetitions: int, in_dim: int = 2048, out_dim: int = 4096) -> Figure:
    """``[num_rows, in_dim] x [in_dim, out_dim]`` over a rotating set of weights, with torch's threads."""
    num_weights = max(2, WEIGHT_SET_BYTES // (in_dim * out_dim * dtype.itemsize))
    first = torch.randn(out_dim, in_dim).mul_(0.02)
    weights = [(first * 127).to(dtype) if dtype == torch.int8 else first.to(dtype) for _ in range(num_weights)]
    rows = torch.randint(-8, 8, (num_rows, in_dim)).to(dtype)
    product = _int8_product if dtype == torch.int8 else torch.nn.functional.linear
    used = weights if num_rows <= 128 else weights[:8]
    rates = []
    with torch.inference_mode():
        product(rows, used[0])
        for _ in range(num_repetitions):
            started_s = time.perf_counter()
            for weight in used:
                product(rows, weight)
            seconds = (time.perf_counter() - started_s) / len(used)
            rates.append(2 * num_rows * in_dim * out_dim / seconds / 1e12)
    return Figure.of("TOP/s" if dtype == torch.int8 else "TFLOP/s", rates)


def _int8_product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch._int_mm(rows, weight.t())


def _compiled_kernels() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "kernels.cpp"), Path(folder, "kernels.so")
        source.write_text(KERNEL_SOURCE)
        compiler = os.environ.get("CXX", "c++")
        flags = ["-O3", "-march=native", "-shared", "-fPIC"]
        subprocess.run([compiler, *flags, "-o", str(library), str(source)], check=True)
        loaded = ctypes.CDLL(str(library))
    loaded.read_lines.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    loaded.read_lines.restype = ctypes.c_uint64
    loaded.copy_lines.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    loaded.copy_lines.restype = None
    return loaded


def memory_buffer(num_bytes: int, huge_pages: bool = False) -> np.ndarray:
    """Aligned to pages, which are written, so that no read is answered by the kernel's one zero page.

    ``huge_pages``: asked for; whether there are any is the kernel's business.
    """
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE if huge_pages else mmap.MADV_NOHUGEPAGE)
    buffer = np.frombuffer(memory, np.uint8)
    buffer[:] = 1
    return buffer


def run_together(part: Callable[[int], None], offsets: Sequence[int]) -> float:
    """Seconds until the last of the threads is done, all let go at once; ctypes releases the interpreter's lock."""
    barrier = threading.Barrier(len(offsets) + 1)

    def work(offset: int) -> None:
        barrier.wait()
        part(offset)
        barrier.wait()

    threads = [threading.Thread(target=work, args=(offset,)) for offset in offsets]
    for thread in threads:
        thread.start()
    barrier.wait()
    started_s = time.perf_counter()
    barrier.wait()
    seconds = time.perf_counter() - started_s
    for thread in threads:
        thread.join()
    return seconds


def measure(num_threads: int, num_repetitions: int) -> dict[str, Figure]:
    """All limits with ``num_threads``, by name."""
    memory = MemoryLimits(num_threads, 2 * GIB, num_repetitions)
    figures = {"read": memory.read(), "copy": memory.copy()}
    del memory
    previous = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for dtype in (torch.float32, torch.bfloat16, torch.int8):
            for num_rows in (1, 8, 32, 128, 1024):
                name = f"{str(dtype).removeprefix('torch.')} M={num_rows} K=2048 N=4096"
                figures[name] = gemm(dtype, num_rows, num_repetitions)
    finally:
        torch.set_num_threads(previous)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure this machine's limits.")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="3 repetitions in place of 11")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    figures = measure(arguments.threads, 3 if arguments.quick else 11)
    for name, figure in figures.items():
        print(f"{name:28s} {figure.median:9.3f} {figure.unit}  [{figure.lowest:.3f}..{figure.highest:.3f}]")
    if arguments.out:
        result = {name: asdict(figure) for name, figure in figures.items()}
        arguments.out.write_text(json.dumps({"threads": arguments.threads, "figures": result}, indent=1))


if __name__ == "__main__":
    main()
