"""The seam between deciding a step and computing it."""

from typing import Protocol

from engine.messages import StepPlan, StepResult


class PendingResults(Protocol):
    """What will come of a plan; an ordinary future is one."""

    def result(self, timeout: float | None = None) -> list[StepResult]:
        """Waits; for one thread to call. Raises as Executor.submit says, or TimeoutError after ``timeout`` seconds."""
        ...


class Executor(Protocol):
    """Carries plans to the ranks of one gang, in one epoch, and brings their results back."""

    def prepare(self, plan: StepPlan) -> None:
        """``plan`` is likely to be submitted next, as this very object: whatever saves time then can be done now."""
        ...

    def submit(self, plan: StepPlan) -> PendingResults:
        """Sends a plan on its way and returns at once.

        Plans are computed in the order in which they were submitted, and their futures end in that order too. A future
        ends when *every* rank has answered: with one result per dp group, in the groups' order (the answer of the
        group's sampling rank, the first with the AdapterOutcomes of all ranks), or with RankFailure or
        ProtocolViolation, after which no later future succeeds.
        """
        ...

    def close(self) -> None:
        """Ends the ranks' loops and frees what this object holds. Futures that have not ended raise RankFailure."""
        ...
