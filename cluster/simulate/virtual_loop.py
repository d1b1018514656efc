"""An asyncio event loop whose time is a number: it jumps to the next timer when nothing else is ready.

The same coroutines run as in production, in the same order for the same seed, an hour in milliseconds. There are no
sockets and no threads; whoever asks for one gets an error.
"""

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Mapping
from typing import Any


class Stuck(Exception):
    """Somebody waits, and nothing is left that could ever happen."""


class _NoFiles(selectors.BaseSelector):
    """Waits for no file; its waiting is what makes time pass."""

    def __init__(self, pass_time: Callable[[float], None]) -> None:
        self._pass_time = pass_time
        self._keys: dict[Any, selectors.SelectorKey] = {}

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """For asyncio's own wake-up pipe, which nobody writes to here."""
        fd = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        self._keys[fd] = selectors.SelectorKey(fileobj, fd, events, data)
        return self._keys[fd]

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._keys.pop(fileobj if isinstance(fileobj, int) else fileobj.fileno())

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise Stuck("nothing is left that could happen, and the run has not ended")
        if timeout > 0:
            self._pass_time(timeout)
        return []

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._keys


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time starts at 0 s. Errors that nobody awaits end the run: ``run`` raises the first."""

    def __init__(self) -> None:
        self._now_s = 0.0
        self.unhandled: list[BaseException] = []
        super().__init__(_NoFiles(self._pass_time))
        self.set_exception_handler(self._note_unhandled)
        self._scheduled: list[asyncio.TimerHandle]

    def _pass_time(self, seconds: float) -> None:
        # Exactly the next timer's moment: asyncio would also let it ring a rounding error too early, and whoever then
        # waits for the rest of the time would do so for ever.
        self._now_s = max(self._now_s, self._scheduled[0].when()) if self._scheduled else self._now_s + seconds

    def _note_unhandled(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.unhandled.append(context.get("exception") or RuntimeError(context["message"]))

    def time(self) -> float:
        return self._now_s

    def _write_to_self(self) -> None:
        """All of it runs in one thread: nobody has to be woken."""

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        raise AssertionError(f"{func} would run in a thread: its timing could not be repeated")


def run(main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Runs ``main`` in a loop of its own. Raises what it raises, Stuck, or the first error that nobody handled."""
    loop = VirtualLoop()
    try:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            result = runner.run(main())
    finally:
        asyncio.set_event_loop(None)
    if loop.unhandled:
        raise loop.unhandled[0]
    return result
