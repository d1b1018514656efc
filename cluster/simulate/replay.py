"""``remuda replay``: a flight record through the real scheduler, supervisor and journals, compared plan by plan.

The engine is built as the head of the record says and gets what it got then, at the same places between its steps; its
executor answers with what the ranks answered. Scheduling knows no clock and no chance, so every plan must be the
recorded one, byte by byte. Failures and formations go through Recovery, outputs through a Journal for each request.
"""

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import msgspec

from cluster.frontend.journal import Journal
from cluster.replica.recovery import Phase, Recovery
from cluster.simulate.record_lines import HeadLine, check_line
from engine.config import CacheConfig
from engine.engine import Engine
from engine.errors import EngineFailure, InvalidOption, InvalidRequest, RemudaError
from engine.executor.channel_executor import by_dp_group
from engine.executor.flight_record import FORMAT
from engine.messages import StepPlan, StepResult, encode
from engine.outputs import Outputs
from engine.packed import unpack
from engine.request import FinishReason, Request

_NUM_SHOWN = 8
_LONGEST_SHOWN = 160

Line = dict[str, Any]


class CannotReplay(InvalidOption):
    """The record does not have all that its engine saw."""


class Differs(Exception):
    """What happens in the replay did not happen then. ``line``: of the file, from 0."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


class _Ends(Exception):
    """The record has nothing more."""


@dataclass
class _Step:
    """A recorded plan and what came back. ``line``: where the plan is."""

    line: int
    message: Any
    answers: dict[int, StepResult] = field(default_factory=dict)


class _Epoch:
    """What is recorded of one formation."""

    def __init__(self) -> None:
        self.steps: list[_Step] = []
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
        if head.get("num_lost", 1):
            raise CannotReplay(
                "the record does not reach back to the engine's start: its oldest entries have made room for others, "
                "and what the scheduler held then is not in it"
            )
        if "engine" not in head or "sampling_ranks" not in head:
            raise CannotReplay("the record was written before there was an engine")
        known = _head(head)
        self.facts = known.engine
        if self.facts.moves_experts:
            raise CannotReplay("experts move between ranks by a clock that is not in the record")
        self.num_ranks, self.sampling_ranks = known.num_ranks, known.sampling_ranks
        self.epochs: dict[int, _Epoch] = {}
        self.calls: dict[tuple[int, bool], list[tuple[int, Line]]] = {}
        """What the engine was asked for, by the step, and whether within it."""
        for number, line in enumerate(self.lines):
            self._sort_in(number, line)

    def _sort_in(self, number: int, line: Line) -> None:
        match line["kind"]:
            case "plan":
                epoch = self.epochs.setdefault(line["message"][1], _Epoch())
                epoch.steps.append(_Step(number, line["message"]))
            case "answer" if line["message"][0] == "result":
                result = msgspec.convert(line["message"], StepResult)
                epoch = self.epochs.setdefault(result.epoch, _Epoch())
                if epoch.failure is None and 0 <= result.step < len(epoch.steps):
                    epoch.steps[result.step].answers[line["rank"]] = result
            case "failure":
                self.epochs.setdefault(line["epoch"], _Epoch()).failure = line["error"]
            case _ if "turn" in line:
                self.calls.setdefault((line["turn"], line["is_news"]), []).append((number, line))

    def before(self, line: int) -> Iterator[str]:
        """The last few entries up to there, each in a line."""
        for number in range(max(0, line - _NUM_SHOWN), min(line + 1, len(self.lines))):
            entry = self.lines[number]
            rest = {key: value for key, value in entry.items() if key not in ("kind", "at_s")}
            yield f"line {number + 1}: {entry['kind']} at {entry.get('at_s', 0.0):.6f} s {_short(rest)}"


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


class _Executor:
    """Answers from the record, and sees to it that it is asked for the same."""

    def __init__(self, recorded: Recorded, epoch: int) -> None:
        self.num_steps = 0
        self._recorded = recorded
        self._epoch = recorded.epochs.get(epoch, _Epoch())
        self._prepared: tuple[StepPlan, bytes] | None = None

    @property
    def left(self) -> list[_Step]:
        return self._epoch.steps[self.num_steps :]

    def prepare(self, plan: StepPlan) -> None:
        self._prepared = (plan, encode(plan))

    def submit(self, plan: StepPlan) -> "Future[list[StepResult]]":
        is_prepared = self._prepared is not None and self._prepared[0] is plan
        data = self._prepared[1] if self._prepared is not None and is_prepared else encode(plan)
        future: Future[list[StepResult]] = Future()
        if not self.left:
            error: Exception = _Ends() if self._epoch.failure is None else EngineFailure(self._epoch.failure)
            future.set_exception(error)
            return future
        step = self.left[0]
        made = msgspec.json.decode(msgspec.json.encode(msgspec.msgpack.decode(data)))
        if made != step.message:
            difference = _difference(msgspec.convert(step.message, StepPlan), msgspec.convert(made, StepPlan))
            raise Differs(step.line, f"the plan of epoch {plan.epoch}, step {plan.step} is another: {difference}")
        self.num_steps += 1
        if len(step.answers) == self._recorded.num_ranks:
            future.set_result(by_dp_group(step.answers, self._recorded.sampling_ranks))
        else:
            future.set_exception(_Ends() if self._epoch.failure is None else EngineFailure(self._epoch.failure))
        return future

    def close(self) -> None:
        """Nobody runs."""


class Replay:
    """Args:
    recorded: all of it.
    """

    def __init__(self, recorded: Recorded) -> None:
        facts = recorded.facts
        self.num_steps = 0
        self.num_tokens = 0
        self._recorded = recorded
        self._journals: dict[str, Journal] = {}
        self._executor = _Executor(recorded, facts.epoch)
        self._last_turn = max((turn for turn, _ in recorded.calls), default=0)
        self._engine = Engine(
            executor=self._executor,
            kv_groups=facts.kv_groups,
            vocab_size=facts.vocab_size,
            scheduler_config=facts.scheduler_config,
            cache_config=facts.cache_config,
            num_dp_groups=facts.num_dp_groups,
            epoch=facts.epoch,
            input_references=facts.input_references,
            lora_config=facts.lora_config,
            model_identity=facts.model_identity,
        )

    def run(self) -> None:
        """Raises Differs at the first difference."""
        turn = 0
        while True:
            self._feed(turn, is_news=False)
            if turn >= self._last_turn and not self._engine.has_work:
                break
            turn += 1
            try:
                self._deliver(self._engine.step(lambda turn=turn: self._feed(turn, is_news=True)))  # type: ignore[misc]
            except _Ends:
                break
            except EngineFailure:
                if turn >= self._last_turn:
                    break  # nobody repaired it
        self._check_all_made()
        check_recovery(self._recorded)

    def _check_all_made(self) -> None:
        self.num_steps += self._executor.num_steps
        if self._executor.left:
            step = self._executor.left[0]
            raise Differs(step.line, f"the plan of step {step.message[2]} is not made")

    def _feed(self, turn: int, *, is_news: bool) -> None:
        for number, line in self._recorded.calls.get((turn, is_news), []):
            try:
                self._call(line)
            except RemudaError as error:
                raise Differs(number, f"the engine does not take what it took then: {error}") from None

    def _call(self, line: Line) -> None:
        match line["kind"]:
            case "request":
                request = msgspec.convert(line["request"], Request)
                self._engine.add(request)
                journal = self._journals[request.request_id] = Journal(request)
                journal.next_action(0.0, [])
                journal.sent("recorded", 0, request.request_id)
            case "abort":
                if not self._engine.abort(line["request_id"]):
                    raise InvalidRequest(f"request {line['request_id']} is not live any more")
            case "load adapter":
                self._engine.load_adapter(line["name"], line["path"])
            case "unload adapter":
                self._engine.unload_adapter(line["name"])
            case "reset":
                self._check_all_made()
                self._executor = _Executor(self._recorded, line["epoch"])
                cache = msgspec.convert(line["cache_config"], CacheConfig)
                self._engine.reset(line["epoch"], executor=self._executor, cache_config=cache)

    def _deliver(self, outputs: Outputs) -> None:
        for output in outputs:
            self.num_tokens += len(output.token_ids)
            if output.finish_reason not in (FinishReason.ABORT, FinishReason.ERROR):
                self._journals[output.request_id].take(output)


def check_recovery(recorded: Recorded) -> None:
    """What the leader told of its gang goes through the supervisor's decisions. What only the supervisor saw is not in
    the record, so its formations may be ahead of what these events alone ask for, and never behind.

    Raises Differs.
    """
    recovery: Recovery | None = None
    is_complete = True
    for number, line in enumerate(recorded.lines):
        match line["kind"]:
            case "epoch":
                epoch, at_s = line["epoch"], line["at_s"]
                recovery = recovery or Recovery(recorded.num_ranks, at_s)
                while recovery.epoch < epoch and recovery.phase is not Phase.FAILED:
                    is_complete = False
                    recovery.gang_broke(recovery.epoch, None, "not in the record", at_s)
                if recovery.epoch > epoch:
                    raise Differs(number, f"epoch {epoch} forms where the supervisor has come to {recovery.epoch}")
                if recovery.phase is Phase.FAILED:
                    if is_complete:
                        raise Differs(number, f"epoch {epoch} forms where the supervisor has given up")
                    return
                recovery.told(epoch, at_s)
                recovery.formed(epoch)
            case "failure" if recovery is not None:
                recovery.gang_broke(line["epoch"], line.get("rank"), line["error"], line["at_s"])
            case "explained" if recovery is not None:
                recovery.explained(line["num_breaks"])


def _difference(then: Any, now: Any, path: str = "") -> str:
    """Where two messages of one type differ first."""
    if isinstance(then, msgspec.Struct) and type(then) is type(now):
        for name in then.__struct_fields__:
            if getattr(then, name) != getattr(now, name):
                return _difference(getattr(then, name), getattr(now, name), f"{path}.{name}" if path else name)
    if isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        for index, pair in enumerate(zip(then, now, strict=True)):
            if pair[0] != pair[1]:
                return _difference(*pair, f"{path}[{index}]")
    return f"{path} was {_short(_readable(then))} and is {_short(_readable(now))}"


def _readable(value: Any) -> Any:
    """Packed numbers (engine.packed) as a list."""
    return unpack(value) if isinstance(value, bytes) and len(value) % 4 == 0 else value


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "…"
