"""``make bench-peers``: us and every installed peer on the same checkpoint, with the same load.

    python -m bench.peers [--model dense-1b] [--tp 2] [--quantization int8] [--cases c1,c8,c32,long8,shared8]
        [--peer NAME=COMMAND] [--gguf FILE] [--repetitions 3] [--out out/peers.json]

Servers run one at a time and take turns: each round starts every one of them, warms it up, runs all cases once and
stops it. In a round all get the same prompts. Peers: vLLM and llama.cpp's server where they are installed or their
commands are given (bench/peer_commands.py), and transformers' generate as a static batch, without a server. Those that
are not there, or fail, are named. Run it on a machine that does nothing else: repetitions beside others' work are
counted, and marked in the JSON.
"""

import argparse
import asyncio
import importlib.util
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console

from bench.bench_cache import model_dir
from bench.generate_process import generating
from bench.load_cases import LoadCase, parse_case
from bench.loadgen import CLEAN_OTHER_CORES, WARM_UP, LoadFailed, LoadGenerator
from bench.measure import Row, row
from bench.output import machine, make_console, print_rows, write_rows
from bench.peer_commands import ServedModel, find_peers
from bench.serving import ServerFailed, free_port, remuda_command, serving

OURS = "remuda"
GENERATE = "transformers"
_ORDINARY_TOKENS = list(range(300, 1300))


@dataclass(frozen=True)
class Figures:
    """One case, once. ``other_cores``: CPU that neither we nor the server used; None where that is not known."""

    out_tok_s: float
    ttft_p50_s: float
    itl_p50_s: float
    other_cores: float | None


@dataclass
class Contest:
    """What is run, and what it gave: by contestant and case one of each round."""

    model: ServedModel
    cases: list[LoadCase]
    commands: dict[str, str]
    our_options: list[str]
    skipped: dict[str, str] = field(default_factory=dict)
    taken: dict[str, dict[str, list[Figures]]] = field(default_factory=dict)

    async def round(self, number: int, console: Console) -> None:
        self._take(OURS, await self._serve(OURS, number), console)
        for name in list(self.commands):
            try:
                self._take(name, await self._serve(name, number), console)
            except (ServerFailed, LoadFailed, OSError) as error:
                console.print(f"{name} left out: {error}")
                self._leave_out(name, str(error).splitlines()[0])
        if GENERATE not in self.skipped:
            self._take(GENERATE, await self._generate(), console)

    def _leave_out(self, name: str, reason: str) -> None:
        del self.commands[name]
        self.taken.pop(name, None)
        self.skipped[name] = reason

    def _take(self, name: str, figures: dict[str, Figures], console: Console) -> None:
        for case, found in figures.items():
            self.taken.setdefault(name, {}).setdefault(case, []).append(found)
            console.print(f"{name:12} {case:8} {found.out_tok_s:8.1f} tokens/s, TTFT {found.ttft_p50_s * 1e3:,.0f} ms")

    async def _serve(self, name: str, number: int) -> dict[str, Figures]:
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        if name == OURS:
            command = remuda_command(
                str(self.model.directory), port, "--served-model-name", self.model.name, *self.our_options
            )
        else:
            command = self.model.command(self.commands[name], port)
        async with serving(command, f"{url}/health") as pid:
            generator = LoadGenerator(url, self.model.name, prompt_tokens(self.model.directory), number, (pid,))
            await generator.run(parse_case(WARM_UP), requests_per_client=1)
            figures = {}
            for case in self.cases:
                found = await generator.run(case)
                figures[case.name] = Figures(found.out_tok_s, found.ttft_p50_s, found.itl_p50_s, found.other_cores)
        return figures

    async def _generate(self) -> dict[str, Figures]:
        """A static batch: everything at once. The time to a first token is that of a batch of one new token each."""
        figures = {}
        async with generating(str(self.model.directory), self.model.num_threads) as process:
            await process.seconds(self.cases[0], 8)
            for case in self.cases:
                first_s = await process.seconds(case, 1)
                all_s = await process.seconds(case, case.num_output_tokens)
                rate = case.num_concurrent * case.num_output_tokens / all_s
                between_s = max(all_s - first_s, 0.0) / (case.num_output_tokens - 1)
                figures[case.name] = Figures(rate, first_s, between_s, None)
        return figures

    @property
    def num_disturbed(self) -> int:
        """Repetitions beside which others used more CPU than a clean one allows."""
        found = [each for cases in self.taken.values() for case in cases.values() for each in case]
        return sum((each.other_cores or 0.0) >= CLEAN_OTHER_CORES for each in found)

    def rows(self) -> list[Row]:
        """Ours against each peer, round by round."""
        rows = []
        for peer in [name for name in self.taken if name != OURS]:
            for benchmark, unit, better in (("output", "tokens/s", "higher"), ("time to first token", "ms", "lower")):
                for case in self.cases:
                    ours, theirs = ([_value(each, unit) for each in self.taken[who][case.name]] for who in (OURS, peer))
                    title = f"{self.model.name}: {benchmark} against {peer}"
                    rows.append(row(title, case.name, unit, ours, theirs, better))
        return rows


def _value(figures: Figures, unit: str) -> float:
    return figures.out_tok_s if unit == "tokens/s" else figures.ttft_p50_s * 1e3


def prompt_tokens(directory: Path) -> list[int]:
    """What prompts are drawn from: the tokens that a benchmark checkpoint names, else ordinary ones."""
    named = directory / "good_ids.json"
    return [int(token_id) for token_id in json.loads(named.read_text())] if named.exists() else _ORDINARY_TOKENS


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


async def _run(contest: Contest, num_rounds: int, console: Console) -> None:
    for number in range(num_rounds):
        await contest.round(number, console)


def main() -> int:
    arguments = _arguments()
    contest = make_contest(arguments)
    console = make_console()
    began_s, about = time.monotonic(), machine()
    asyncio.run(_run(contest, arguments.repetitions, Console(stderr=True)))
    rows = contest.rows()
    for name, reason in contest.skipped.items():
        console.print(f"{name} skipped: {reason}")
    if contest.num_disturbed:
        console.print(f"{contest.num_disturbed} repetitions were disturbed: others used over {CLEAN_OTHER_CORES} core")
    print_rows(rows, console)
    about |= {
        "model": contest.model.name,
        "tp": arguments.tp,
        "quantization": arguments.quantization,
        "skipped": contest.skipped,
        "repetitions": {
            name: {case: [asdict(each) for each in found] for case, found in cases.items()}
            for name, cases in contest.taken.items()
        },
    }
    write_rows(arguments.out, rows, time.monotonic() - began_s, about)
    console.print(f"{len(rows)} ratios in {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
