"""An executor without a model, for measuring what a leader's own work costs."""

from concurrent.futures import Future

from engine.messages import SampledToken, StepPlan, StepResult


class NullExecutor:
    """Answers every plan at once: each request that wants a token gets ``token_id``."""

    def __init__(self, token_id: int = 1) -> None:
        self._token_id = token_id

    def prepare(self, plan: StepPlan) -> None:
        """Nothing is sent."""

    def submit(self, plan: StepPlan) -> "Future[list[StepResult]]":
        future: Future[list[StepResult]] = Future()
        future.set_result(
            [
                StepResult.of(
                    plan.epoch, plan.step, group, [SampledToken(slot, self._token_id) for slot in batch.sampling_slots]
                )
                for group, batch in enumerate(plan.batches)
            ]
        )
        return future

    def close(self) -> None:
        """Nothing is held."""
