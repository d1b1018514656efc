"""Native kernels against what the machine can do at best, on ``num_threads`` threads that each work on their own data,
as the ranks of a gang do: products of few tokens and attention against reading memory, of many against a bfloat16 GEMM.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.nn import functional

from bench.limits import MemoryLimits, memory_buffer, run_together
from bench.measure import Row, row
from engine.kernels.decode_attention import DecodeRequests, can_attend, decode_attention
from engine.kernels.linear import can_multiply_int8, linear, linear_int8

NUM_OUTPUTS, NUM_INPUTS = 4096, 2048
READ_TOKENS = (1, 4, 8, 16, 32)
GEMM_TOKENS = (128, 512)
BLOCK_SIZE, NUM_KV_HEADS, NUM_HEADS, HEAD_DIM = 16, 4, 16, 64
CONTEXT = 2048
BATCHES = (1, 8, 32)
_NUM_GEMM_WEIGHTS = 8
_GEMM_TOKENS = 1024
_NUM_READS = 5

Work = Callable[[int], None]
"""Does one thread's part; the argument is its number."""


class Roofs:
    """The two ceilings, measured again next to every figure."""

    def __init__(self, num_threads: int, set_bytes: int) -> None:
        """``set_bytes``: what each thread goes through before it comes back to the same data: more than caches hold."""
        self.num_threads = num_threads
        self.set_bytes = set_bytes
        self._memory = MemoryLimits(num_threads, num_threads * set_bytes, _NUM_READS, huge_pages=True)
        self._hidden = torch.randn(_GEMM_TOKENS, NUM_INPUTS, dtype=torch.bfloat16)
        shape = (num_threads, _NUM_GEMM_WEIGHTS, NUM_OUTPUTS, NUM_INPUTS)
        self._weights = torch.randn(shape, dtype=torch.bfloat16)

    def read_gb_s(self) -> float:
        """Best of five reads of memory in huge pages."""
        return self._memory.read().highest

    def gemm_tflop_s(self) -> float:
        def work(thread: int) -> None:
            for weight in self._weights[thread]:
                functional.linear(self._hidden, weight)

        num_flops = 2 * self._weights.numel() * _GEMM_TOKENS
        return num_flops / self.seconds(work) / 1e12

    def seconds(self, work: Work) -> float:
        """Until the last of the threads is done."""

        def alone(thread: int) -> None:
            torch.set_num_threads(1)
            with torch.inference_mode():
                work(thread)

        return run_together(alone, range(self.num_threads))


@contextmanager
def open_roofs(quick: bool, num_threads: int) -> Iterator[Roofs]:
    """``quick``: data that fit into caches; shows that everything runs and nothing else. Torch has one thread then."""
    previous = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield Roofs(num_threads, (64 if quick else 640) * 2**20)
    finally:
        torch.set_num_threads(previous)


def run(num_repetitions: int, quick: bool, num_threads: int) -> list[Row]:
    with open_roofs(quick, num_threads) as roofs:
        return [
            *_products(roofs, torch.bfloat16, num_repetitions),
            *_products(roofs, torch.int8, num_repetitions),
            *_attention(roofs, num_repetitions),
        ]


def _products(roofs: Roofs, dtype: torch.dtype, num_repetitions: int) -> list[Row]:
    name = f"linear {str(dtype).removeprefix('torch.')} [{NUM_OUTPUTS}, {NUM_INPUTS}]"
    weights = rotating(roofs, (NUM_OUTPUTS, NUM_INPUTS), dtype)
    scales = torch.rand(NUM_OUTPUTS)
    if dtype is torch.int8 and not can_multiply_int8(weights[0][0], torch.bfloat16):
        return []  # this CPU has no tile units: there is no kernel to measure
    rows = []
    for num_tokens in (*READ_TOKENS, *GEMM_TOKENS):
        hidden = torch.randn(num_tokens, NUM_INPUTS, dtype=torch.bfloat16)
        used = len(weights[0]) if num_tokens in READ_TOKENS else min(len(weights[0]), _NUM_GEMM_WEIGHTS)

        def work(thread: int, hidden: torch.Tensor = hidden, used: int = used) -> None:
            for weight in weights[thread][:used]:
                if dtype is torch.int8:
                    linear_int8(hidden, weight, scales)
                else:
                    linear(hidden, weight)

        matrices = used * roofs.num_threads
        case = tokens_case(num_tokens)
        if num_tokens in READ_TOKENS:
            gigabytes = matrices * weights[0][0].nbytes / 1e9
            rows.append(against_read(roofs, name, case, work, gigabytes, num_repetitions))
        else:
            teraflops = matrices * 2 * num_tokens * NUM_OUTPUTS * NUM_INPUTS / 1e12
            rows.append(against_gemm(roofs, name, case, work, teraflops, num_repetitions))
    return rows


def _attention(roofs: Roofs, num_repetitions: int) -> list[Row]:
    """Each call's requests have blocks of their own, scattered over the whole cache."""
    shape = (BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    blocks_per_request = CONTEXT // BLOCK_SIZE
    pools = rotating(roofs, shape, torch.bfloat16)
    num_blocks = len(pools[0]) // 2 // blocks_per_request * blocks_per_request
    caches = [(pool[:num_blocks], pool[num_blocks : 2 * num_blocks]) for pool in pools]
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0))
    rows = []
    for batch in BATCHES:
        query = torch.randn(batch, NUM_HEADS, HEAD_DIM, dtype=torch.bfloat16)
        if not can_attend(query, caches[0][0]):
            return []  # as above
        num_calls = max(num_blocks // (batch * blocks_per_request), 1)
        tables = order.repeat(math.ceil(batch * blocks_per_request / num_blocks))
        tables = tables[: num_calls * batch * blocks_per_request].view(num_calls, batch, blocks_per_request)
        first, last = torch.zeros(batch, dtype=torch.int64), torch.full((batch,), CONTEXT)
        requests = DecodeRequests(torch.arange(batch), torch.arange(batch), first, last)

        def work(
            thread: int,
            query: torch.Tensor = query,
            tables: torch.Tensor = tables,
            requests: DecodeRequests = requests,
        ) -> None:
            output = torch.empty_like(query)
            for table in tables:
                decode_attention(query, output, *caches[thread], table, requests)

        position_bytes = 2 * NUM_KV_HEADS * HEAD_DIM * query.element_size()
        gigabytes = num_calls * batch * CONTEXT * position_bytes * roofs.num_threads / 1e9
        case = f"{batch} × {CONTEXT} positions"
        rows.append(against_read(roofs, "decode attention", case, work, gigabytes, num_repetitions))
    return rows


def tokens_case(num_tokens: int) -> str:
    return f"{num_tokens} token{'s' * (num_tokens > 1)}"


def rotating(roofs: Roofs, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> list[torch.Tensor]:
    """For each thread a tensor [n, *shape] in huge pages, as large as the roofs' set; of ordinary values, floats times
    ``scale``."""
    is_int8 = dtype is torch.int8
    one = torch.randint(-127, 128, shape, dtype=dtype) if is_int8 else (torch.randn(shape) * scale).to(dtype)
    return copies(roofs, one)


def copies(roofs: Roofs, one: torch.Tensor) -> list[torch.Tensor]:
    """As ``rotating``, of one tensor's values."""
    count = max(roofs.set_bytes // one.nbytes, 1)
    found = []
    for _ in range(roofs.num_threads):
        buffer = torch.from_numpy(memory_buffer(count * one.nbytes, huge_pages=True))
        found.append(buffer.view(one.dtype).view(count, *one.shape).copy_(one))
    return found


def against_read(roofs: Roofs, name: str, case: str, work: Work, gigabytes: float, num_repetitions: int) -> Row:
    def rate() -> float:
        return gigabytes / roofs.seconds(work)

    note = f"÷ best of {_NUM_READS} reads of memory in huge pages beside it; {roofs.num_threads} threads"
    return _row(name, case, "GB/s", rate, roofs.read_gb_s, num_repetitions, note)


def against_gemm(roofs: Roofs, name: str, case: str, work: Work, teraflops: float, num_repetitions: int) -> Row:
    def rate() -> float:
        return teraflops / roofs.seconds(work)

    gemm = f"[{_GEMM_TOKENS}, {NUM_INPUTS}] × [{NUM_INPUTS}, {NUM_OUTPUTS}]"
    note = f"÷ torch's bfloat16 product {gemm} beside it; {roofs.num_threads} threads"
    return _row(name, case, "TFLOP/s", rate, roofs.gemm_tflop_s, num_repetitions, note)


def _row(
    name: str, case: str, unit: str, rate: Callable[[], float], roof: Callable[[], float], repetitions: int, note: str
) -> Row:
    rate()  # pages, code and scratch are there now
    ours, theirs = [], []
    for _ in range(repetitions):
        theirs.append(roof())
        ours.append(rate())
    return row(name, case, unit, ours, theirs, "higher", note)
