"""Many inputs of one seed against a running server, and what is wrong with its answers."""

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from tests.fuzz.bodies import Bodies
from tests.fuzz.grpc_inputs import GrpcInput, GrpcInputs
from tests.fuzz.grpc_wire import call
from tests.fuzz.http_framing import HttpInput
from tests.fuzz.http_inputs import HttpInputs
from tests.fuzz.http_wire import BadAnswer, ask
from tests.fuzz.verdicts import grpc_fault, grpc_is_refused, http_fault, http_is_refused

_HOST = "127.0.0.1"
_HTTP_SHARE = 0.6
_AT_ONCE = 16
_MOST_FAULTS = 10
_SHOWN_CHARS = 600


@dataclass
class Report:
    """``kinds``: inputs by kind; ``outcomes``: answers by API and status. ``slowest``: seconds and index."""

    seed: int
    num_inputs: int = 0
    num_refused: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: dict[int, str] = field(default_factory=dict)
    slowest: tuple[float, int] = (0.0, 0)

    def told(self) -> str:
        """Every fault with the command that repeats it."""
        lines = [
            f"python -m tests.fuzz --seed {self.seed} --index {index}: {fault}"
            for index, fault in sorted(self.faults.items())
        ]
        return "\n".join(lines)


class Fuzzer:
    """Args:
    seed: of all inputs.
    http_port: of the server, on this machine.
    grpc_port: of the same.
    """

    def __init__(self, seed: int, http_port: int, grpc_port: int) -> None:
        self.seed = seed
        self._ports = http_port, grpc_port
        self._http, self._grpc = HttpInputs(Bodies()), GrpcInputs()

    def input(self, index: int) -> HttpInput | GrpcInput:
        rng = Random(f"{self.seed} {index}")
        return (self._http if rng.random() < _HTTP_SHARE else self._grpc).make(rng)

    async def run(self, report: Report, is_enough: Callable[[Report], bool]) -> Report:
        """Goes on where the report ends, several at once, until it is enough or there are many faults."""
        indices = itertools.count(report.num_inputs)

        async def work() -> None:
            while not is_enough(report) and len(report.faults) < _MOST_FAULTS:
                await self._one(next(indices), report)

        await asyncio.gather(*(work() for _ in range(_AT_ONCE)))
        return report

    async def answered(self, index: int) -> tuple[HttpInput | GrpcInput, object, str | None]:
        """One input, its answer, and what is wrong with that."""
        given = self.input(index)
        try:
            if isinstance(given, HttpInput):
                answers = await ask(_HOST, self._ports[0], given)
                return given, answers, http_fault(given, answers)
            answer = await call(_HOST, self._ports[1], given)
            return given, answer, grpc_fault(given, answer)
        except (BadAnswer, OSError) as error:
            return given, None, f"{type(error).__name__}: {error}"

    async def _one(self, index: int, report: Report) -> None:
        began_s = time.perf_counter()
        given, answer, fault = await self.answered(index)
        report.slowest = max(report.slowest, (time.perf_counter() - began_s, index))
        report.num_inputs += 1
        is_http = isinstance(given, HttpInput)
        report.kinds[f"{'http' if is_http else 'grpc'} {given.kind}"] += 1
        if isinstance(answer, list):
            report.num_refused += http_is_refused(answer)
            for each in answer:
                report.outcomes[f"http {each.status}"] += 1
        elif not is_http and fault is None:
            report.num_refused += grpc_is_refused(answer)  # type: ignore[arg-type]
            report.outcomes[f"grpc {getattr(answer, 'status', 'none')}"] += 1
        if fault is not None:
            report.faults[index] = f"{fault}: {given!r:.{_SHOWN_CHARS}} -> {answer!r:.{_SHOWN_CHARS}}"
