"""What one GPU can do at best: copies of its memory and products of bfloat16 matrices; and how work on it is timed."""

from collections.abc import Callable

import torch

from bench.measure import Row, row

DEVICE = torch.device("cuda")
_COPY_BYTES = 2 * 2**30
_GEMM_SIZE = 8192
_NUM_CALLS = 10


class GpuRoofs:
    """The two ceilings, measured again next to every figure."""

    def __init__(self) -> None:
        self._source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=DEVICE)
        self._destination = torch.empty_like(self._source)
        self._matrices = [torch.randn(_GEMM_SIZE, _GEMM_SIZE, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]

    def copy_gb_s(self) -> float:
        """Bytes read plus bytes written."""
        return 2 * _COPY_BYTES / 1e9 / seconds(lambda: self._destination.copy_(self._source))

    def gemm_tflop_s(self) -> float:
        left, right = self._matrices
        return 2 * _GEMM_SIZE**3 / 1e12 / seconds(lambda: left @ right)

    def against_copy(
        self, name: str, case: str, work: Callable[[], object], num_bytes: float, num_repetitions: int
    ) -> Row:
        """``num_bytes``: that ``work`` has to read and write at least."""
        note = "bytes that must be read or written ÷ time; reference: a copy within the GPU's memory beside it"
        return self._row(name, case, "GB/s", work, num_bytes / 1e9, self.copy_gb_s, num_repetitions, note)

    def against_gemm(
        self, name: str, case: str, work: Callable[[], object], num_flops: float, num_repetitions: int
    ) -> Row:
        note = f"reference: torch's bfloat16 product of two [{_GEMM_SIZE}, {_GEMM_SIZE}] beside it"
        return self._row(name, case, "TFLOP/s", work, num_flops / 1e12, self.gemm_tflop_s, num_repetitions, note)

    def _row(
        self,
        name: str,
        case: str,
        unit: str,
        work: Callable[[], object],
        amount: float,
        roof: Callable[[], float],
        num_repetitions: int,
        note: str,
    ) -> Row:
        seconds(work)  # kernels are compiled now
        ours, theirs = [], []
        for _ in range(num_repetitions):
            theirs.append(roof())
            ours.append(amount / seconds(work))
        return row(name, case, unit, ours, theirs, "higher", note)


def seconds(work: Callable[[], object]) -> float:
    """Of one call, by the GPU's own clock, over several that follow one another without a gap."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    work()
    torch.cuda.synchronize()
    began.record()
    for _ in range(_NUM_CALLS):
        work()
    ended.record()
    torch.cuda.synchronize()
    milliseconds: float = began.elapsed_time(ended)
    return milliseconds / 1e3 / _NUM_CALLS
