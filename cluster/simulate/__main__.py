"""``python -m cluster.simulate``: many simulated deployments, each with its own faults.

--seeds 2000         as many seeds, from --first on (make simulate SEEDS=2000)
--seed 71            this one, with its log: a seed that failed fails again, at the same message
--explore            every single fault at every message of a small deployment
"""

import argparse
import logging
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.progress import track

from cluster.simulate.runs import Outcome, all_cases, run_case, run_seed

_SHOWN = 5


def main() -> int:
    """Exit status 1 where a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--explore", action="store_true")
    parser.add_argument("-x", dest="first_only", action="store_true", help="end with the first broken promise")
    options = parser.parse_args()
    if options.seed is not None:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
        outcome = run_seed(options.seed)
        print(outcome.error or f"{outcome.name} holds: {outcome.num_messages} messages, digest {outcome.digest}")
        return int(bool(outcome.error))
    logging.disable(logging.CRITICAL)
    if options.explore:
        return _report("states", _all(run_case, all_cases(), options.first_only))
    seeds = range(options.first, options.first + options.seeds)
    return _report("seeds", _all(run_seed, seeds, options.first_only))


def _all(function: Callable[[Any], Outcome], arguments: Sequence[Any], first_only: bool) -> tuple[list[Outcome], float]:
    began_s = time.monotonic()
    outcomes = []
    with multiprocessing.Pool() as pool:
        found = pool.imap_unordered(function, arguments, chunksize=4)
        for outcome in track(found, total=len(arguments), description="simulating", disable=not sys.stderr.isatty()):
            outcomes.append(outcome)
            if first_only and outcome.error:
                break
    return outcomes, time.monotonic() - began_s


def _report(what: str, found: tuple[list[Outcome], float]) -> int:
    outcomes, seconds = found
    broken = sorted((outcome for outcome in outcomes if outcome.error), key=lambda outcome: outcome.name)
    for outcome in broken[:_SHOWN]:
        print(f"{outcome.name}\n{outcome.error}")
    num_tokens = sum(outcome.num_tokens for outcome in outcomes)
    hours = sum(outcome.virtual_s for outcome in outcomes) / 3600
    num_messages = sum(outcome.num_messages for outcome in outcomes)
    print(
        f"{len(outcomes)} {what}: {len(outcomes) - len(broken)} held, {len(broken)} broke a promise; "
        f"{num_messages:,} messages, {num_tokens:,} tokens, {hours:.1f} simulated hours in {seconds:.0f} s"
    )
    for outcome in broken[_SHOWN:]:
        print(f"also: {outcome.name}")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
