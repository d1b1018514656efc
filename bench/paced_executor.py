"""An executor without ranks for measuring a leader: the wire work is done, and a step takes its time.

engine.executor.null answers at once and leaves the wire work out.
"""

import time
from concurrent.futures import Future

import msgspec

from engine.messages import SampledToken, StepPlan, StepResult, decode_from_rank, encode


class _PackedResult(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="result"):
    """StepResult with its list packed already: a rank's cost that must not count as the leader's."""

    epoch: int
    step: int
    rank: int
    sampled: msgspec.Raw


class _TimedFuture(Future[list[StepResult]]):
    """Ends when the step that it stands for would."""

    def __init__(self, due_s: float) -> None:
        super().__init__()
        self._due_s = due_s

    def result(self, timeout: float | None = None) -> list[StepResult]:
        if (left_s := self._due_s - time.monotonic()) > 0:
            time.sleep(left_s)
        return super().result(timeout=0)


class PacedExecutor:
    """For one dp group. Every scheduled request that wants a token gets token 7.

    Args:
        step_s: how long a step takes, from its plan's submission; 0: its future has ended already.
    """

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._encoded: tuple[StepPlan, bytes] | None = None
        self._packed_slots: list[int] = []
        self._packed = msgspec.Raw(b"")

    def prepare(self, plan: StepPlan) -> None:
        self._encoded = (plan, encode(plan))

    def submit(self, plan: StepPlan) -> Future[list[StepResult]]:
        if self._encoded is None or self._encoded[0] is not plan:
            encode(plan)
        slots = [share.slot for share in plan.batches[0].scheduled if share.sample]
        if slots != self._packed_slots:
            self._packed_slots = slots
            self._packed = msgspec.Raw(msgspec.msgpack.encode([SampledToken(slot, 7) for slot in slots]))
        answer = msgspec.msgpack.encode(_PackedResult(plan.epoch, plan.step, 0, self._packed))
        result = decode_from_rank(answer)
        assert isinstance(result, StepResult)
        future = _TimedFuture(time.monotonic() + self._step_s)
        future.set_result([result])
        return future

    def close(self) -> None:
        """Nothing to end."""
