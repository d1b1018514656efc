"""Repeats inputs of a seed against a server that runs: ``remuda serve remuda-tiny`` first.

With --guarded, the server is one that asks who calls: ``python -m tests.fuzz.guarded FOLDER`` makes its files.
"""

import argparse
import asyncio
from pathlib import Path

from tests.fuzz.campaign import Fuzzer, Report
from tests.fuzz.guarded import Guard


async def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz",
        description=__doc__,
        epilog="examples: python -m tests.fuzz --seed 7 --index 1234; python -m tests.fuzz --seed 8 --number 20000",
    )
    parser.add_argument("--seed", type=int, default=0, help="of all inputs (default 0)")
    parser.add_argument("--index", type=int, help="this input alone, shown with its answer")
    parser.add_argument("--number", type=int, default=1000, help="inputs from the first on (default 1000)")
    parser.add_argument("--port", type=int, default=8000, help="HTTP (default 8000)")
    parser.add_argument("--grpc-port", type=int, default=50051, help="gRPC (default 50051)")
    parser.add_argument("--guarded", type=Path, metavar="FOLDER", help="the server has this folder's security file")
    asked = parser.parse_args()
    guard = None if asked.guarded is None else Guard.read(asked.guarded)
    fuzzer = Fuzzer(asked.seed, asked.port, asked.grpc_port, guard)
    if asked.index is not None:
        given, answer, fault = await fuzzer.answered(asked.index)
        print(f"{given!r}\n-> {answer!r}\n{fault or 'fine'}")
        return int(fault is not None)
    report = await fuzzer.run(Report(asked.seed, guard), lambda report: report.num_inputs >= asked.number)
    print(
        f"{report.num_inputs} inputs, {report.num_refused} refused, "
        f"slowest {report.slowest[0]:.2f} s (input {report.slowest[1]})"
    )
    print(dict(report.kinds), dict(sorted(report.outcomes.items())), report.told(), sep="\n")
    return int(bool(report.faults))


if __name__ == "__main__":
    raise SystemExit(asyncio.run(main()))
