"""A flight record as ``remuda replay`` reads it: what came when, and where a replay can begin."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from cluster.replica.resumable_engine import EngineState
from cluster.simulate.record_lines import HeadLine, check_line
from engine.errors import InvalidOption
from engine.executor.flight_record import FORMAT
from engine.messages import StepResult
from engine.request import Request

_NUM_SHOWN = 8
_LONGEST_SHOWN = 160

Line = dict[str, Any]


class CannotReplay(InvalidOption):
    """The record does not have all that its engine saw."""


@dataclass
class RecordedStep:
    """A recorded plan and what came back. ``line``: where the plan is."""

    line: int
    message: Any
    answers: dict[int, StepResult] = field(default_factory=dict)


class RecordedEpoch:
    """What is recorded of one formation."""

    def __init__(self) -> None:
        self.steps: dict[int, RecordedStep] = {}
        """By number, in their order."""
        self.failure: str | None = None


class Recorded:
    """Args:
    data: the file.

    Raises CannotReplay.
    """

    def __init__(self, data: bytes) -> None:
        self.lines = [_decode(number, line) for number, line in enumerate(data.splitlines())]
        head = self.lines[0] if self.lines else {}
        if head.get("kind") != "head" or head.get("format") != FORMAT:
            raise CannotReplay(f"this is no flight record of format {FORMAT}")
        if "engine" not in head or "sampling_ranks" not in head:
            raise CannotReplay("the record was written before there was an engine")
        known = _head(head)
        self.facts = known.engine
        if self.facts.moves_experts:
            raise CannotReplay(
                "the server moves experts between ranks (--enable-eplb) by a clock that is not in the record"
            )
        self.num_ranks, self.sampling_ranks = known.num_ranks, known.sampling_ranks
        self.epochs: dict[int, RecordedEpoch] = {}
        self.calls: dict[tuple[int, bool], list[tuple[int, Line]]] = {}
        """What the engine was asked for, by the step, and whether within it."""
        self.requests: dict[int, Request] = {}
        """By arrival."""
        self.states: dict[int, tuple[int, EngineState]] = {}
        """What the engine held, by the call of ``step``, and where that is."""
        for number, line in enumerate(self.lines):
            self._sort_in(number, line)
        self.begin: tuple[int, EngineState] | None = self._first_state() if head.get("num_lost", 1) else None
        """Where a replay begins; None: with a new engine."""

    def _first_state(self) -> tuple[int, EngineState]:
        """The first that is whole: none of its plans in flight is lost, and so no answer to them, and no request.
        Raises CannotReplay."""
        for number, state in self.states.values():
            epoch = self.epochs.get(state.epoch, RecordedEpoch())
            has_plans = all(step in epoch.steps for step in state.steps_in_flight)
            if has_plans and self.requests.keys() >= set(state.scheduling.arrivals):
                return number, state
        raise CannotReplay(
            "the record does not reach back to the engine's start: its oldest entries have made room for others, and "
            "what the scheduler held at any time since is not in it"
        )

    def _sort_in(self, number: int, line: Line) -> None:
        match line["kind"]:
            case "plan":
                epoch = self.epochs.setdefault(line["message"][1], RecordedEpoch())
                epoch.steps[line["message"][2]] = RecordedStep(number, line["message"])
            case "answer" if line["message"][0] == "result":
                result = msgspec.convert(line["message"], StepResult)
                epoch = self.epochs.setdefault(result.epoch, RecordedEpoch())
                if epoch.failure is None and result.step in epoch.steps:
                    epoch.steps[result.step].answers[line["rank"]] = result
            case "failure":
                self.epochs.setdefault(line["epoch"], RecordedEpoch()).failure = line["error"]
            case "state":
                state = msgspec.convert(line["state"], EngineState, str_keys=True)
                self.states[state.turn] = (number, state)
            case _ if "turn" in line:
                if line["kind"] == "request" and "arrival" in line:
                    if line["arrival"] in self.requests:
                        return  # it became old while the record was written
                    self.requests[line["arrival"]] = msgspec.convert(line["request"], Request, str_keys=True)
                self.calls.setdefault((line["turn"], line["is_news"]), []).append((number, line))

    def before(self, line: int) -> Iterator[str]:
        """The last few entries up to there, each in a line."""
        for number in range(max(0, line - _NUM_SHOWN), min(line + 1, len(self.lines))):
            entry = self.lines[number]
            rest = {key: value for key, value in entry.items() if key not in ("kind", "at_s")}
            yield f"line {number + 1}: {entry['kind']} at {entry.get('at_s', 0.0):.6f} s {shortened(rest)}"


def _decode(number: int, data: bytes) -> Line:
    """Raises CannotReplay."""
    try:
        line = msgspec.json.decode(data, type=Line)
        if number:
            check_line(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        message = f"this is no flight record of format {FORMAT}, or a damaged one: line {number + 1}: {error}"
        raise CannotReplay(message) from None
    return line


def _head(line: Line) -> HeadLine:
    """Raises CannotReplay."""
    try:
        known = msgspec.convert(line, HeadLine)
    except msgspec.ValidationError as error:
        raise CannotReplay(f"this flight record is damaged, or another version's: its head: {error}") from None
    if not set(known.sampling_ranks) <= set(range(known.num_ranks)):
        raise CannotReplay("this flight record is damaged: ranks that sample are not ranks of its gang")
    return known


def shortened(value: Any) -> str:
    """For a line of output."""
    text = str(value)
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "…"
