"""Servers that take turns on one checkpoint with the same load, and what their figures become."""

import asyncio
import importlib.metadata
import json
import time
from collections.abc import Awaitable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from bench.cpu_use import CpuMeter
from bench.generate_process import GenerateProcess, generating
from bench.load_cases import LoadCase, parse_case
from bench.loadgen import CASE_LIMIT_S, CLEAN_OTHER_CORES, WARM_UP, LoadFailed, LoadGenerator
from bench.measure import Row, row
from bench.peer_commands import ServedModel
from bench.peer_record import StartedServer, started_server
from bench.serving import ServerFailed, free_port, remuda_command, serving

OURS = "remuda"
GENERATE = "transformers"
FAILURES = (ServerFailed, LoadFailed, RuntimeError, ValueError, LookupError, OSError)
"""Of a contestant: it is not there, does not start, breaks a request, takes too long or ends."""
_ORDINARY_TOKENS = list(range(300, 1300))
T = TypeVar("T")


@dataclass(frozen=True)
class Figures:
    """One case, once. ``other_cores``: CPU that neither we nor the server used; None where that is not known."""

    out_tok_s: float
    ttft_p50_s: float
    itl_p50_s: float
    other_cores: float | None

    @property
    def is_clean(self) -> bool:
        return self.other_cores is not None and self.other_cores < CLEAN_OTHER_CORES


@dataclass
class Contest:
    """What is run, and what it gave: by contestant and case one of each round; and how each was started.
    ``case_limit_s``: that one case may take."""

    model: ServedModel
    cases: list[LoadCase]
    commands: dict[str, str]
    our_options: list[str]
    skipped: dict[str, str] = field(default_factory=dict)
    taken: dict[str, dict[str, list[Figures]]] = field(default_factory=dict)
    started: dict[str, StartedServer] = field(default_factory=dict)
    case_limit_s: float = CASE_LIMIT_S

    async def round(self, number: int, console: Console) -> None:
        """Each contestant once. A peer that fails is left out from then on; what we fail with is raised."""
        self._take(OURS, await self._serve(OURS, number), console)
        peers = [*self.commands, *([] if GENERATE in self.skipped else [GENERATE])]
        for name in peers:
            try:
                figures = await (self._generate() if name == GENERATE else self._serve(name, number))
            except FAILURES as error:
                console.print(f"{name} left out: {error}", markup=False)
                self._leave_out(name, (str(error).splitlines() or [type(error).__name__])[0])
            else:
                self._take(name, figures, console)

    def _leave_out(self, name: str, reason: str) -> None:
        """What it gave in earlier rounds stays."""
        self.commands.pop(name, None)
        num_rounds = max(map(len, self.taken.get(name, {}).values()), default=0)
        self.skipped[name] = f"in its round {num_rounds + 1}: {reason}" if num_rounds else reason

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
            self.started[name] = await started_server(pid, command, url)
            tokens = prompt_tokens(self.model.directory)
            generator = LoadGenerator(url, self.model.name, tokens, number, (pid,), self.case_limit_s)
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
            version = importlib.metadata.version("transformers")
            self.started[GENERATE] = StartedServer("generate, a static batch", {}, version, process.dtype)
            await self._in_time("the warm-up", process.seconds(self.cases[0], 8))
            for case in self.cases:
                figures[case.name] = await self._in_time(case.name, _generated(process, case))
        return figures

    async def _in_time(self, what: str, work: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(self.case_limit_s):
                return await work
        except TimeoutError:
            raise LoadFailed(f"{what} was not over in {self.case_limit_s:g} s") from None

    @property
    def num_disturbed(self) -> int:
        """Repetitions beside which others used more CPU than a clean one allows, or that do not know."""
        found = [each for cases in self.taken.values() for case in cases.values() for each in case]
        return sum(not each.is_clean for each in found)

    def rows(self) -> list[Row]:
        """Ours against each peer, round by round: the rounds in which both were clean, or all where there is none."""
        rows = []
        for peer in [name for name in self.taken if name != OURS]:
            for benchmark, unit, better in (("output", "tokens/s", "higher"), ("time to first token", "ms", "lower")):
                for case in self.cases:
                    # A peer that failed has fewer rounds than we have.
                    pairs = list(zip(*(self.taken[who].get(case.name, []) for who in (OURS, peer)), strict=False))
                    if not pairs:
                        continue
                    clean = [pair for pair in pairs if all(each.is_clean for each in pair)]
                    used = clean or pairs
                    ours, theirs = ([_value(each, unit) for each in side] for side in zip(*used, strict=True))
                    title = f"{self.model.name}: {benchmark}, {self._named(OURS)} against {self._named(peer)}"
                    found = row(title, case.name, unit, ours, theirs, better)
                    rows.append(replace(found, clean_of_all=(len(clean), len(pairs))))
        return rows

    def _named(self, name: str) -> str:
        """With its precision: a ratio between two of them says nothing without it."""
        started = self.started.get(name)
        known = started.precision if started else None
        return f"{name} ({known or 'precision not known'})"

    def about(self) -> dict[str, object]:
        """What the results keep besides the rows."""
        return {
            "model": self.model.name,
            "skipped": self.skipped,
            "servers": {name: asdict(started) for name, started in self.started.items()},
            "repetitions": {
                name: {case: [asdict(each) for each in found] for case, found in cases.items()}
                for name, cases in self.taken.items()
            },
        }


async def _generated(process: GenerateProcess, case: LoadCase) -> Figures:
    meter, began_s = CpuMeter(), time.perf_counter()
    first_s = await process.seconds(case, 1)
    all_s = await process.seconds(case, case.num_output_tokens)
    _, others = meter.cores(time.perf_counter() - began_s)
    rate = case.num_concurrent * case.num_output_tokens / all_s
    between_s = max(all_s - first_s, 0.0) / (case.num_output_tokens - 1)
    return Figures(rate, first_s, between_s, others)


def _value(figures: Figures, unit: str) -> float:
    return figures.out_tok_s if unit == "tokens/s" else figures.ttft_p50_s * 1e3


def prompt_tokens(directory: Path) -> list[int]:
    """What prompts are drawn from: the tokens that a benchmark checkpoint names, else ordinary ones."""
    named = directory / "good_ids.json"
    return [int(token_id) for token_id in json.loads(named.read_text())] if named.exists() else _ORDINARY_TOKENS
