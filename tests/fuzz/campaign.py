"""Many inputs of one seed against a running server, and what is wrong with its answers."""

import asyncio
import itertools
import ssl
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from tests.fuzz.bodies import Bodies
from tests.fuzz.grpc_inputs import GrpcInput, GrpcInputs
from tests.fuzz.grpc_wire import GrpcAnswer, call
from tests.fuzz.guarded import Guard
from tests.fuzz.guarded_inputs import GuardedInput, grpc_breach, guarded, http_breach
from tests.fuzz.http_framing import HttpInput
from tests.fuzz.http_inputs import HttpInputs
from tests.fuzz.http_wire import BadAnswer, HttpAnswer, ask, ask_in_clear
from tests.fuzz.verdicts import grpc_fault, grpc_is_refused, http_fault, http_is_refused

_HOST = "127.0.0.1"
_HTTP_SHARE = 0.6
_AT_ONCE = 16
_MOST_FAULTS = 10
_SHOWN_CHARS = 600
_REFUSAL_S = 10.0
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"

Input = HttpInput | GrpcInput | GuardedInput
Answer = list[HttpAnswer] | GrpcAnswer | bytes | None


@dataclass
class Report:
    """``kinds``: inputs by kind; ``outcomes``: answers by API and status. ``slowest``: seconds and index, of all;
    ``slowest_refusal``: of those that were refused. ``guard``: of the server, where it has one."""

    seed: int
    guard: Guard | None = None
    num_inputs: int = 0
    num_refused: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: dict[int, str] = field(default_factory=dict)
    slowest: tuple[float, int] = (0.0, 0)
    slowest_refusal: tuple[float, int] = (0.0, 0)

    def told(self) -> str:
        """Every fault with the command that repeats it."""
        guarded_by = "" if self.guard is None else f" --guarded {self.guard.folder}"
        lines = [
            f"python -m tests.fuzz{guarded_by} --seed {self.seed} --index {index}: {fault}"
            for index, fault in sorted(self.faults.items())
        ]
        return "\n".join(lines)


class Fuzzer:
    """Args:
    seed: of all inputs.
    http_port: of the server, on this machine.
    grpc_port: of the same.
    guard: what the server asks for.
    """

    def __init__(self, seed: int, http_port: int, grpc_port: int, guard: Guard | None = None) -> None:
        self.seed = seed
        self._ports = http_port, grpc_port
        self._http, self._grpc = HttpInputs(Bodies()), GrpcInputs()
        self._guard = guard
        self._tls: tuple[ssl.SSLContext | None, ssl.SSLContext | None] = (None, None)
        if guard is not None:
            self._tls = guard.context(), guard.context("h2")
        self._pieces = [] if guard is None else guard.pieces()

    def input(self, index: int) -> Input:
        rng = Random(f"{self.seed} {index}")
        made = (self._http if rng.random() < _HTTP_SHARE else self._grpc).make(rng)
        return made if self._guard is None else guarded(made, self._guard, rng)

    async def run(self, report: Report, is_enough: Callable[[Report], bool], at_once: int = _AT_ONCE) -> Report:
        """Goes on where the report ends, several at once, until it is enough or there are many faults."""
        indices = itertools.count(report.num_inputs)

        async def work() -> None:
            while not is_enough(report) and len(report.faults) < _MOST_FAULTS:
                await self._one(next(indices), report)

        await asyncio.gather(*(work() for _ in range(at_once)))
        return report

    async def answered(self, index: int) -> tuple[Input, Answer, str | None]:
        """One input, its answer, and what is wrong with that."""
        given = self.input(index)
        began_s = time.perf_counter()
        try:
            answer, fault = await self._exchanged(given)
        except (BadAnswer, OSError) as error:
            return given, None, f"{type(error).__name__}: {error}"
        took_s = time.perf_counter() - began_s
        if fault is None and took_s > _REFUSAL_S and _is_refused(answer):
            fault = f"it was refused after {took_s:.1f} s"
        return given, answer, fault

    async def _exchanged(self, given: Input) -> tuple[Answer, str | None]:
        """Raises BadAnswer, OSError."""
        if not isinstance(given, GuardedInput):
            return await self._plainly(given)
        if given.in_clear:
            is_http = isinstance(given.given, HttpInput)
            data = (b"" if is_http else _PREFACE) + given.given.data
            told = await ask_in_clear(_HOST, self._ports[0 if is_http else 1], data)
            return told, "it speaks without TLS" if b"HTTP/" in told or b"grpc" in told else None
        answer, fault = await self._plainly(given.given)
        if isinstance(answer, list):
            fault = fault or http_breach(given, answer)
            told = b"".join(each.body + repr(each.headers).encode() for each in answer)
        elif answer is None:
            return answer, fault
        else:
            assert isinstance(answer, GrpcAnswer)
            fault = fault or grpc_breach(given, answer)
            told = answer.data + repr(answer.trailers).encode() + answer.message.encode()
        if any(piece in told for piece in self._pieces):
            fault = "it tells a part of a key"
        return answer, fault

    async def _plainly(self, given: HttpInput | GrpcInput) -> tuple[Answer, str | None]:
        if isinstance(given, HttpInput):
            answers = await ask(_HOST, self._ports[0], given, self._tls[0])
            return answers, http_fault(given, answers)
        answer = await call(_HOST, self._ports[1], given, self._tls[1])
        return answer, grpc_fault(given, answer)

    async def _one(self, index: int, report: Report) -> None:
        began_s = time.perf_counter()
        given, answer, fault = await self.answered(index)
        took = (time.perf_counter() - began_s, index)
        report.slowest = max(report.slowest, took)
        report.num_inputs += 1
        plain = given.given if isinstance(given, GuardedInput) else given
        report.kinds[f"{'http' if isinstance(plain, HttpInput) else 'grpc'} {plain.kind}"] += 1
        if fault is not None:
            report.faults[index] = f"{fault}: {given!r:.{_SHOWN_CHARS}} -> {answer!r:.{_SHOWN_CHARS}}"
            return
        if _is_refused(answer):
            report.slowest_refusal = max(report.slowest_refusal, took)
        report.num_refused += _is_refused(answer) or not answer  # a client that left has none
        report.outcomes.update(_outcomes(given, answer))


def _is_refused(answer: Answer) -> bool:
    """Of an answer that was waited for."""
    if isinstance(answer, list):
        return bool(answer) and http_is_refused(answer)
    return isinstance(answer, bytes) or (isinstance(answer, GrpcAnswer) and grpc_is_refused(answer))


def _outcomes(given: Input, answer: Answer) -> list[str]:
    if isinstance(given, GuardedInput) and given.in_clear:
        return ["in clear"]
    if isinstance(answer, list):
        return [f"http {each.status}" for each in answer]
    return [f"grpc {getattr(answer, 'status', 'none')}"]
