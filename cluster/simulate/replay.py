"""``remuda replay``: a flight record through the real scheduler, supervisor and journals, compared plan by plan.

The engine is built as the head of the record says and gets what it got then, at the same places between its steps; its
executor answers with what the ranks answered. Scheduling knows no clock and no chance, so every plan must be the
recorded one, byte by byte. Where the beginning has made room, the engine goes on from the first state that is recorded;
at all later ones it must hold just that. Failures and formations go through Recovery, outputs through a Journal for
each request.
"""

from concurrent.futures import Future
from typing import Any

import msgspec

from cluster.frontend.journal import Journal
from cluster.replica.recovery import Phase, Recovery
from cluster.replica.resumable_engine import EngineState, ResumableEngine
from cluster.simulate.recorded import CannotReplay, Line, Recorded, RecordedEpoch, RecordedStep, shortened
from engine.config import CacheConfig
from engine.errors import EngineFailure, InvalidRequest, RemudaError
from engine.executor.channel_executor import by_dp_group
from engine.messages import StepPlan, StepResult, encode
from engine.outputs import Outputs
from engine.packed import unpack
from engine.request import FinishReason, Output, Request
from engine.scheduler.snapshot import Unreadable

_OF_NONSENSE = (ArithmeticError, AssertionError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What a state that was tampered with may come to, somewhere."""


class Differs(Exception):
    """What happens in the replay did not happen then. ``line``: of the file, from 0."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


class _Ends(Exception):
    """The record has nothing more."""


class _Executor:
    """Answers from the record, and sees to it that it is asked for the same.

    Args:
        first_step: of those that it will be asked for.
    """

    def __init__(self, recorded: Recorded, epoch: int, first_step: int = 0) -> None:
        self.num_steps = 0
        self.last_line = 0
        """Of the plan that was asked for last."""
        self._recorded = recorded
        self._epoch = recorded.epochs.get(epoch, RecordedEpoch())
        self._next_step = first_step
        self._prepared: tuple[StepPlan, bytes] | None = None

    def first_left(self) -> RecordedStep | None:
        """Of those that are recorded and were not asked for."""
        return next((step for number, step in self._epoch.steps.items() if number >= self._next_step), None)

    def prepare(self, plan: StepPlan) -> None:
        self._prepared = (plan, encode(plan))

    def submit(self, plan: StepPlan) -> "Future[list[StepResult]]":
        is_prepared = self._prepared is not None and self._prepared[0] is plan
        data = self._prepared[1] if self._prepared is not None and is_prepared else encode(plan)
        step = self._epoch.steps.get(plan.step)
        if step is not None:
            made = msgspec.json.decode(msgspec.json.encode(msgspec.msgpack.decode(data)))
            if made != step.message:
                difference = _difference(_plan(step.message), _plan(made))
                raise Differs(step.line, f"the plan of epoch {plan.epoch}, step {plan.step} is another: {difference}")
            self.num_steps += 1
            self.last_line = step.line
            self._next_step = plan.step + 1
        return self._answers(step)

    def resume(self, number: int) -> "tuple[StepPlan, Future[list[StepResult]]]":
        """A plan that had left before the replay begins."""
        step = self._epoch.steps[number]
        return _plan(step.message), self._answers(step)

    def _answers(self, step: RecordedStep | None) -> "Future[list[StepResult]]":
        future: Future[list[StepResult]] = Future()
        if step is not None and len(step.answers) == self._recorded.num_ranks:
            future.set_result(by_dp_group(step.answers, self._recorded.sampling_ranks))
        else:
            future.set_exception(_Ends() if self._epoch.failure is None else EngineFailure(self._epoch.failure))
        return future

    def close(self) -> None:
        """Nobody runs."""


class _Engine(ResumableEngine):
    """Must hold what is recorded that it held. ``recorded``, ``turn``: of its replay."""

    recorded: Recorded
    turn = 0

    def _make_draft(self) -> None:
        if self.turn in self.recorded.states:
            line = self.recorded.states[self.turn][0]
            then, now = (
                self.recorded.lines[line]["state"],
                msgspec.json.decode(msgspec.json.encode(self._state(self.turn))),
            )
            if now != then:
                raise Differs(line, f"the engine's state after {self.turn} steps is another: {_difference(then, now)}")
        super()._make_draft()


class Replay:
    """Args:
    recorded: all of it.

    Raises CannotReplay where the state that it begins with cannot be read, and Differs.
    """

    def __init__(self, recorded: Recorded) -> None:
        self.num_steps = 0
        self.num_tokens = 0
        self._recorded = recorded
        self._journals: dict[str, Journal] = {}
        self._last_turn = max((turn for turn, _ in recorded.calls), default=0)
        facts = recorded.facts
        if recorded.begin is None:
            self._executor = _Executor(recorded, facts.epoch)
            self._engine = self._new_engine(facts.epoch, facts.cache_config)
        else:
            self._resume(*recorded.begin)

    def _new_engine(self, epoch: int, cache_config: CacheConfig) -> _Engine:
        facts = self._recorded.facts
        engine = _Engine(
            executor=self._executor,
            kv_groups=facts.kv_groups,
            vocab_size=facts.vocab_size,
            scheduler_config=facts.scheduler_config,
            cache_config=cache_config,
            num_dp_groups=facts.num_dp_groups,
            epoch=epoch,
            input_references=facts.input_references,
            lora_config=facts.lora_config,
            model_identity=facts.model_identity,
        )
        engine.recorded = self._recorded
        return engine

    def _resume(self, line: int, state: EngineState) -> None:
        self._executor = _Executor(self._recorded, state.epoch, state.next_step)
        self._engine = self._new_engine(state.epoch, state.cache_config)
        self._engine.turn = state.turn
        in_flight = {step: self._executor.resume(step) for step in state.steps_in_flight}
        try:
            for request, token_ids in self._engine.resume(state, self._recorded.requests, in_flight):
                self._open_journal(request).take(Output(request.request_id, token_ids))
        except (*_OF_NONSENSE, Unreadable, RemudaError) as error:
            message = f"this flight record is damaged, or another version's: the state in line {line + 1}: {error!r}"
            raise CannotReplay(message) from error

    def run(self) -> None:
        """Raises Differs at the first difference."""
        try:
            self._run()
        except _OF_NONSENSE as error:
            if self._recorded.begin is None:
                raise  # a defect
            message = f"then the engine cannot go on with what it began with, or has a defect: {error!r}"
            raise Differs(self._executor.last_line, message) from error

    def _run(self) -> None:
        turn = self._engine.turn
        while True:
            self._feed(turn, is_news=False)
            if turn >= self._last_turn and not self._engine.has_work:
                break
            turn = self._engine.turn = turn + 1
            try:
                self._deliver(self._engine.step(lambda turn=turn: self._feed(turn, is_news=True)))  # type: ignore[misc]
            except _Ends:
                break
            except EngineFailure as error:
                if turn >= self._last_turn:
                    break  # nobody repaired it
                if all(line["kind"] != "reset" for _, line in self._recorded.calls.get((turn, False), [])):
                    raise Differs(self._executor.last_line, f"then the engine fails, as it did not: {error}") from None
        self._check_all_made()
        check_recovery(self._recorded)

    def _check_all_made(self) -> None:
        self.num_steps += self._executor.num_steps
        if (step := self._executor.first_left()) is not None:
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
                request = msgspec.convert(line["request"], Request, str_keys=True)
                self._engine.add(request)
                self._open_journal(request)
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

    def _open_journal(self, request: Request) -> Journal:
        journal = self._journals[request.request_id] = Journal(request)
        journal.next_action(0.0, [])
        journal.sent("recorded", 0, request.request_id)
        return journal

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
    first = 0
    if recorded.begin is not None:
        first, state = recorded.begin
        recovery = Recovery(recorded.num_ranks, recorded.lines[first]["at_s"], state.epoch)
        recovery.formed(state.epoch)
    for number, line in enumerate(recorded.lines[first:], first):
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


def _plan(message: Any) -> StepPlan:
    return msgspec.convert(message, StepPlan, str_keys=True)


def _difference(then: Any, now: Any, path: str = "") -> str:
    """Where two messages of one type differ first, or two values in JSON."""
    if isinstance(then, msgspec.Struct) and type(then) is type(now):
        for name in then.__struct_fields__:
            if getattr(then, name) != getattr(now, name):
                return _difference(getattr(then, name), getattr(now, name), f"{path}.{name}" if path else name)
    if isinstance(then, dict) and isinstance(now, dict) and then.keys() == now.keys():
        for name in then:
            if then[name] != now[name]:
                return _difference(then[name], now[name], f"{path}.{name}" if path else name)
    if isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        for index, pair in enumerate(zip(then, now, strict=True)):
            if pair[0] != pair[1]:
                return _difference(*pair, f"{path}[{index}]")
    return f"{path} was {shortened(_readable(then))} and is {shortened(_readable(now))}"


def _readable(value: Any) -> Any:
    """Packed numbers (engine.packed) as a list."""
    return unpack(value) if isinstance(value, bytes) and len(value) % 4 == 0 else value
