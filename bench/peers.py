"""``make bench-peers``: us and every installed peer on the same checkpoint, with the same load.

    python -m bench.peers [--model dense-1b] [--tp 2] [--quantization int8] [--cases c1,c8,c32,long8,shared8]
        [--peer NAME=COMMAND] [--gguf FILE] [--repetitions 3] [--out out/peers.json]

Servers run one at a time and take turns: each round starts every one of them, warms it up, runs all cases once and
stops it. In a round all get the same prompts. Peers: vLLM and llama.cpp's server where they are installed or their
commands are given (bench/peer_commands.py), and transformers' generate as a static batch, without a server. Those that
are not there, fail, or take longer than 15 minutes for a case are named. Run it on a machine that does nothing else:
ratios are of the rounds in which neither side was disturbed, or of all where there is none, which the table says. The
JSON is written after each round, and says how every server was started: command, variables, version, precision.
"""

import argparse
import asyncio
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from bench.bench_cache import model_dir
from bench.contest import GENERATE, Contest
from bench.interrupts import run_main
from bench.load_cases import parse_case
from bench.loadgen import CLEAN_OTHER_CORES, LoadFailed
from bench.output import machine, make_console, print_rows, write_rows
from bench.peer_commands import ServedModel, find_peers
from bench.serving import ServerFailed


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dense-1b", help="a directory, or a name of make bench-models")
    parser.add_argument("--tp", type=int, default=2, help="our ranks, and the peers' threads")
    parser.add_argument("--quantization", choices=["int8"], help="of our weights")
    parser.add_argument("--cases", default="c1,c8,c32,long8,shared8")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND", help="a peer's start command")
    parser.add_argument("--gguf", type=Path, help="the checkpoint for llama.cpp")
    parser.add_argument("--without", action="append", default=[], metavar="NAME", help="leave a peer out")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("out/peers.json"))
    arguments = parser.parse_args()
    try:
        arguments.cases = [parse_case(name) for name in arguments.cases.split(",")]
    except ValueError as error:
        parser.error(str(error))
    if arguments.repetitions < 1:
        parser.error(f"--repetitions must be at least 1, not {arguments.repetitions}")
    if bad := [text for text in arguments.peer if not all(text.partition("="))]:
        parser.error(f"--peer {bad[0]}: write NAME=COMMAND")
    directory = Path(arguments.model) if Path(arguments.model).is_dir() else model_dir(arguments.model)
    if not (directory / "config.json").exists():
        parser.error(f"--model {arguments.model}: {directory} is not there; make bench-models builds it")
    arguments.model = directory.absolute()
    return arguments


def make_contest(arguments: argparse.Namespace) -> Contest:
    model = ServedModel.of(arguments.model, arguments.tp, arguments.gguf)
    given = {name: command for name, _, command in (text.partition("=") for text in arguments.peer)}
    commands, skipped = find_peers(model, given)
    if importlib.util.find_spec("transformers") is None:
        skipped[GENERATE] = "not installed in this environment"
    for name in arguments.without:
        commands.pop(name, None)
        skipped[name] = "--without"
    options = ["--tp", str(arguments.tp), "--dtype", "bfloat16", "--max-model-len", "2048"]
    options += ["--quantization", arguments.quantization] if arguments.quantization else []
    return Contest(model, arguments.cases, commands, options, skipped)


async def _run(contest: Contest, num_rounds: int, save: Callable[[], None]) -> None:
    for number in range(num_rounds):
        await contest.round(number, Console(stderr=True))
        save()


def main() -> int:
    """Exit status 1 where we ourselves failed."""
    arguments = _arguments()
    contest = make_contest(arguments)
    console = make_console()
    began_s, about = time.monotonic(), machine()
    about |= {"tp": arguments.tp, "quantization": arguments.quantization}

    def save() -> None:
        write_rows(arguments.out, contest.rows(), time.monotonic() - began_s, about | contest.about())

    failure: Exception | None = None
    try:
        asyncio.run(_run(contest, arguments.repetitions, save))
    except (ServerFailed, LoadFailed) as error:
        failure = error
    for name, reason in contest.skipped.items():
        console.print(f"{name} skipped: {reason}", markup=False)
    if contest.num_disturbed:
        console.print(f"{contest.num_disturbed} repetitions were disturbed: others used over {CLEAN_OTHER_CORES} core")
    rows = contest.rows()
    print_rows(rows, console)
    save()
    console.print(f"{len(rows)} ratios in {arguments.out}")
    if failure:
        console.print(f"remuda failed: {failure}", markup=False)
    return int(failure is not None)


if __name__ == "__main__":
    run_main(main)
