"""What delay between two hosts costs a pipeline: ``python -m bench.pipeline_delay`` (wants bench-models, and root).

Two hosts (network namespaces), a pipeline stage of dense-0.5b on each, the leader beside the first; eight requests
decode, divided into one to four micro-batches, with 0 and with 5 ms one way, in turns in one gang. Prints tokens a
second, and the throughput that is kept of the best without delay. Ends with 1 where that is under 0.8.
"""

import argparse
import os
import statistics
import sys
import time

# Before torch is imported, here and in every rank.
os.environ |= {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}

from bench.bench_cache import model_dir
from bench.delayed_gang import Figures, run_gang
from tests.support.hosts.bed import Bed

DELAYS_MS = (0.0, 5.0)
LEAST_KEPT = 0.8


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Example: python -m bench.pipeline_delay --depths 2,3",
    )
    parser.add_argument("--model", help="a checkpoint's directory (default: dense-0.5b of the benchmarks)")
    parser.add_argument("--depths", default="1,2,3,4", help="numbers of micro-batches in flight (default 1,2,3,4)")
    parser.add_argument("--repetitions", type=int, default=2)
    asked = parser.parse_args()
    model = asked.model or str(model_dir("dense-0.5b"))
    found: dict[int, Figures] = {}
    began_s = time.monotonic()
    with Bed(2) as bed:
        for depth in map(int, asked.depths.split(",")):
            found[depth] = run_gang(bed, model, depth, DELAYS_MS, asked.repetitions)
            rates = ", ".join(f"{delay:g} ms {[round(rate, 1) for rate in found[depth][delay]]}" for delay in DELAYS_MS)
            print(f"{depth} in flight: {rates} tokens/s ({time.monotonic() - began_s:.0f} s)", flush=True)
    medians = {(depth, delay): statistics.median(rates) for depth, by in found.items() for delay, rates in by.items()}
    best = max(rate for (_, delay), rate in medians.items() if delay == 0)
    print("\n| micro-batches in flight | tokens/s, no delay | tokens/s, 5 ms one way | kept of the best |")
    print("|---|---|---|---|")
    for depth in found:
        without, delayed = (medians[depth, delay] for delay in DELAYS_MS)
        print(f"| {depth} | {without:.1f} | {delayed:.1f} | {delayed / best:.2f} |")
    kept = max(rate for (_, delay), rate in medians.items() if delay > 0) / best
    return kept < LEAST_KEPT


if __name__ == "__main__":
    sys.exit(main())
