"""An engine that notes in the flight record what it is asked for, and when: with the plans and answers that the
executor notes, everything that its scheduler saw, so that ``remuda replay`` can do it again. Now and then it notes what
it holds as well: a replay can begin there when what came before has made room."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import msgspec

from cluster.replica.resumable_engine import ResumableEngine
from engine.config import CacheConfig, KvGroupConfig, LoraConfig, SchedulerConfig
from engine.executor.executor import Executor
from engine.executor.flight_record import FlightRecord
from engine.outputs import Outputs
from engine.request import AdapterInfo, Request


class EngineFacts(msgspec.Struct, frozen=True):
    """Arguments of an Engine, as the head of a record has them. ``moves_experts``: by a clock of its own."""

    kv_groups: tuple[KvGroupConfig, ...]
    vocab_size: int
    scheduler_config: SchedulerConfig
    cache_config: CacheConfig
    epoch: int
    num_dp_groups: int
    input_references: bool
    lora_config: LoraConfig
    model_identity: str
    moves_experts: bool


class RecordedEngine(ResumableEngine):
    """See Engine. ``options``: its arguments. ``on_explained``: see engine.scheduler.break_trials.BreakTrials."""

    def __init__(
        self, record: FlightRecord, on_explained: Callable[[int], None] = lambda num_breaks: None, **options: Any
    ) -> None:
        super().__init__(**options)
        self._record = record
        self._on_explained = on_explained
        self.trials.on_explained = self._note_explained
        self._num_turns = 0
        self._is_news = False
        facts = EngineFacts(
            kv_groups=self._kv_groups,
            vocab_size=self._vocab_size,
            scheduler_config=self._config,
            cache_config=self._cache_config,
            epoch=self._epoch,
            num_dp_groups=self._num_dp_groups,
            input_references=self._input_references,
            lora_config=options.get("lora_config", LoraConfig()),
            model_identity=self._model_identity,
            moves_experts=self._moves_experts,
        )
        record.describe(is_live=self.is_live, engine=msgspec.to_builtins(facts))

    def is_live(self, request_id: str) -> bool:
        """From any thread."""
        return request_id in self._states

    @property
    def _moves_experts(self) -> bool:
        """Mixtures over several ranks are counted in any case, which decides nothing."""
        return self._experts is not None and self._experts.may_move

    @property
    def _when(self) -> dict[str, Any]:
        """So many calls of ``step`` had begun, and whether the last of them was asking for news."""
        return {"turn": self._num_turns, "is_news": self._is_news}

    def _note_explained(self, num_breaks: int) -> None:
        self._record.event("explained", num_breaks=num_breaks)
        self._on_explained(num_breaks)

    def step(self, news: Callable[[], None] = lambda: None) -> Outputs:
        self._num_turns += 1

        def told() -> None:
            self._is_news = True
            try:
                news()
            finally:
                self._is_news = False

        return super().step(told)

    def _make_draft(self) -> None:
        # Now and then, while the ranks compute. Where experts move by a clock there is no replay to begin from it.
        if self._record.wants_state and not self._moves_experts:
            state = self._state(self._num_turns)
            self._record.state(state, state.scheduling.arrivals)
        super()._make_draft()

    def add(self, request: Request) -> None:
        super().add(request)
        self._record.request(request, arrival=self._num_arrivals - 1, **self._when)

    def abort(self, request_id: str) -> bool:
        was_live = super().abort(request_id)
        if was_live:
            self._record.event("abort", request_id=request_id, **self._when)
        return was_live

    def load_adapter(self, name: str, path: str) -> "Future[AdapterInfo]":
        future = super().load_adapter(name, path)
        self._record.event("load adapter", name=name, path=path, **self._when)
        return future

    def unload_adapter(self, name: str) -> "Future[None]":
        future = super().unload_adapter(name)
        self._record.event("unload adapter", name=name, **self._when)
        return future

    def reset(self, epoch: int, *, executor: Executor | None = None, cache_config: CacheConfig | None = None) -> None:
        super().reset(epoch, executor=executor, cache_config=cache_config)
        cache = msgspec.to_builtins(self._cache_config)
        self._record.event("reset", epoch=epoch, cache_config=cache, **self._when)
