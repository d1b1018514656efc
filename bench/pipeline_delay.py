"""What delay between two hosts costs a pipeline: ``make bench-pipeline`` (wants bench-models, and root).

Two hosts (network namespaces), a pipeline stage of dense-0.5b on each, the leader beside the first; eight requests
decode, divided into one to four micro-batches, with 0 and with 5 ms one way, in turns in one gang. Prints tokens a
second, and the throughput that is kept of the best without delay. Ends with 1 where that is under 0.8 for as many
micro-batches as ``remuda serve`` has in flight, whatever another number of them keeps.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Mapping

# Before torch is imported, here and in every rank.
os.environ |= {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}

from bench.bench_cache import model_dir
from bench.delayed_gang import Figures, run_gang
from engine.executor.defaults import plans_in_flight
from tests.support.hosts.bed import Bed

DELAYS_MS = NO_DELAY_MS, DELAY_MS = (0.0, 5.0)
SERVED_DEPTH = plans_in_flight("cpu", 2)
"""Micro-batches in flight of a gang with two stages."""
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
    depths = [int(depth) for depth in asked.depths.split(",")]
    if SERVED_DEPTH not in depths:
        parser.error(f"--depths {asked.depths}: {SERVED_DEPTH} must be among them, which is what is served")
    model = asked.model or str(model_dir("dense-0.5b"))
    found: dict[int, Figures] = {}
    began_s = time.monotonic()
    with Bed(2) as bed:
        for depth in depths:
            found[depth] = run_gang(bed, model, depth, DELAYS_MS, asked.repetitions)
            rates = ", ".join(f"{delay:g} ms {[round(rate, 1) for rate in found[depth][delay]]}" for delay in DELAYS_MS)
            print(f"{depth} in flight: {rates} tokens/s ({time.monotonic() - began_s:.0f} s)", flush=True)
    kept = shares_kept(found)
    print("\n| micro-batches in flight | tokens/s, no delay | tokens/s, 5 ms one way | kept of the best |")
    print("|---|---|---|---|")
    for depth in found:
        without, delayed = (statistics.median(found[depth][delay]) for delay in DELAYS_MS)
        print(f"| {depth} | {without:.1f} | {delayed:.1f} | {kept[depth]:.2f} |")
    print(f"\n{SERVED_DEPTH} in flight, as served, keep {kept[SERVED_DEPTH]:.2f} (at least {LEAST_KEPT} asked)")
    return is_missed(found)


def is_missed(found: Mapping[int, Figures]) -> bool:
    return shares_kept(found)[SERVED_DEPTH] < LEAST_KEPT


def shares_kept(found: Mapping[int, Figures]) -> dict[int, float]:
    """By the number of micro-batches: the throughput with delay ÷ the best of any number without."""
    best = max(statistics.median(by_delay[NO_DELAY_MS]) for by_delay in found.values())
    return {depth: statistics.median(by_delay[DELAY_MS]) / best for depth, by_delay in found.items()}


if __name__ == "__main__":
    sys.exit(main())
