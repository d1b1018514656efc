"""A gang's LoRA adapters as the leader knows them: which slot has which, what the next plan changes, who waits."""

from collections import deque
from collections.abc import Sequence, Set
from concurrent.futures import Future
from dataclasses import dataclass, field

from engine.config import LoraConfig
from engine.errors import AdapterError, InvalidRequest
from engine.messages import NO_ADAPTER, AdapterChange, AdapterOutcome, LoadAdapter, UnloadAdapter
from engine.request import AdapterInfo


@dataclass(slots=True, eq=False)
class Adapter:
    """``loaded`` ends when the ranks have answered, ``unloaded`` (if somebody asked) when the slot was freed."""

    info: AdapterInfo
    slot: int
    number: int
    """Counts loads, so that the same name loaded again is another adapter."""
    loaded: "Future[AdapterInfo]" = field(default_factory=Future)
    unloaded: "Future[None] | None" = None


class AdapterTable:
    """Over all epochs of one engine. Calls come from the engine's thread."""

    def __init__(self, config: LoraConfig) -> None:
        self._config = config
        self._num_loads = 0
        self._by_name: dict[str, Adapter] = {}
        """Loaded and being loaded."""
        self._leaving: list[Adapter] = []
        """To be unloaded as soon as no request has it."""
        self._failed: list[Adapter] = []
        """Which some rank could not load, to be unloaded by the next plan; their slots count as free."""
        self._free_slots = list(range(config.max_loras - 1, -1, -1))
        self._queue: list[Adapter] = []
        """Whose loading goes into the next plan."""
        self._sent: deque[Adapter] = deque()
        """Whose changes are in plans in flight, in their order."""

    def load(self, name: str, path: str) -> "Future[AdapterInfo]":
        """Whoever asks for what is being loaded already, as all front ends of a new leader do, waits for the same.
        Raises AdapterError where it cannot be tried; the future does where a rank could not load it."""
        other = self._by_name.get(name)
        if other is not None and other.info.path == path and not other.loaded.done():
            return other.loaded
        if other is not None:
            raise AdapterError(f"the adapter {name!r} is loaded already; unload it first, or choose another name")
        if not self._free_slots:
            raise AdapterError(f"there is room for {self._config.max_loras} adapters (--max-loras); unload one first")
        self._num_loads += 1
        adapter = Adapter(AdapterInfo(name, path), self._free_slots.pop(), self._num_loads)
        self._by_name[name] = adapter
        self._queue.append(adapter)
        return adapter.loaded

    def unload(self, name: str) -> "Future[None]":
        """From now on no request can name it; the future ends when the last that did has ended and the slot is free.

        Raises AdapterError where there is none of that name, or it is still being loaded.
        """
        adapter = self._by_name.get(name)
        if adapter is None:
            raise AdapterError(f"there is no adapter {name!r}; loaded are: {', '.join(self._by_name) or 'none'}")
        if not adapter.loaded.done():
            raise AdapterError(f"the adapter {name!r} is still being loaded; try again when it is")
        del self._by_name[name]
        adapter.unloaded = Future()
        self._leaving.append(adapter)
        return adapter.unloaded

    @property
    def is_empty(self) -> bool:
        """Whether no rank has any, or is about to."""
        return not (self._by_name or self._leaving or self._failed or self._queue or self._sent)

    def slot_of(self, name: str) -> int:
        """Raises InvalidRequest where no such adapter is loaded. The empty name is the base model's."""
        if not name:
            return NO_ADAPTER
        adapter = self._by_name.get(name)
        if adapter is None or not adapter.loaded.done():
            raise InvalidRequest(f"the adapter {name!r} is not loaded", "model")
        return adapter.slot

    def identity_of(self, name: str) -> str:
        """Differs for any two adapters that ever had the same name or slot. The base model's is empty."""
        return f"{name}#{self._by_name[name].number}" if name else ""

    @property
    def loaded(self) -> tuple[AdapterInfo, ...]:
        return tuple(adapter.info for adapter in self._by_name.values() if adapter.loaded.done())

    @property
    def has_work(self) -> bool:
        """Whether something is left for a later plan."""
        return bool(self._queue or self._leaving or self._failed)

    def take_changes(self, used_slots: Set[int]) -> list[AdapterChange]:
        """For the next plan, which must be sent. ``used_slots``: of the adapters that live requests have."""
        changes: list[AdapterChange] = []
        # What begins anew after a reset is there once it was loaded again.
        unused = [adapter for adapter in self._leaving if adapter.slot not in used_slots and adapter not in self._queue]
        for adapter in (*self._failed, *unused):
            changes.append(UnloadAdapter(adapter.slot))
            self._sent.append(adapter)
        for adapter in self._queue:
            changes.append(LoadAdapter(adapter.slot, adapter.info.path, self._config.max_rank))
            self._sent.append(adapter)
        self._failed.clear()
        self._queue.clear()
        self._leaving = [adapter for adapter in self._leaving if adapter not in unused]
        # Plans take effect in order, so the slots can be given away from now on.
        self._free_slots += [adapter.slot for adapter in unused]
        return changes

    def returned(self, changes: Sequence[AdapterChange], outcomes: Sequence[AdapterOutcome]) -> set[int]:
        """A plan with ``changes`` has returned. Returns the slots of the adapters that could not be loaded."""
        failed: set[int] = set()
        for change in changes:
            adapter = self._sent.popleft()
            if isinstance(change, UnloadAdapter):
                if adapter.unloaded is not None:
                    adapter.unloaded.set_result(None)
                continue
            of_ranks = [outcome for outcome in outcomes if outcome.slot == change.slot]
            errors = [outcome.error for outcome in of_ranks if outcome.error]
            num_bytes = sum(outcome.num_bytes for outcome in of_ranks)
            adapter.info = AdapterInfo(adapter.info.name, adapter.info.path, num_bytes)
            if errors:
                failed.add(change.slot)
                self._give_up(adapter, errors[0])
            elif not adapter.loaded.done():
                adapter.loaded.set_result(adapter.info)
        return failed

    def _give_up(self, adapter: Adapter, error: str) -> None:
        if self._by_name.get(adapter.info.name) is adapter:
            del self._by_name[adapter.info.name]
            self._failed.append(adapter)
            self._free_slots.append(adapter.slot)
        if not adapter.loaded.done():
            adapter.loaded.set_exception(AdapterError(error))

    def restart(self, used_slots: Set[int]) -> None:
        """A new epoch, whose ranks hold nothing: what is loaded, or leaving and still in use, is loaded again."""
        kept = [*self._by_name.values(), *(adapter for adapter in self._leaving if adapter.slot in used_slots)]
        gone = [adapter for adapter in (*self._leaving, *self._sent) if adapter not in kept]
        self._leaving = [adapter for adapter in self._leaving if adapter in kept]
        self._sent.clear()
        self._failed.clear()
        self._queue = kept
        taken = {adapter.slot for adapter in kept}
        self._free_slots = [slot for slot in reversed(range(self._config.max_loras)) if slot not in taken]
        for adapter in gone:
            if adapter.unloaded is not None and not adapter.unloaded.done():
                adapter.unloaded.set_result(None)

    def check_integrity(self) -> None:
        """Asserts what must hold between any two calls."""
        slots = [adapter.slot for adapter in (*self._by_name.values(), *self._leaving)] + self._free_slots
        assert sorted(slots) == list(range(self._config.max_loras)), "an adapter slot was lost or given away twice"
