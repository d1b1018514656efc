"""Answers steps while the rank launches the next ones: a thread of a rank whose device works on by itself."""

import queue
import threading
from collections.abc import Callable

from engine.executor.channel import ChannelClosed, RankChannel
from engine.executor.launched_step import LaunchedStep
from engine.messages import encode


class ResultSender:
    """Sends results in the order of ``put``.

    Where a step fails on the device, ``report`` (step, error) is called, and the channel is closed, which wakes whoever
    waits there for a plan; ``raise_failure`` then has the reason.
    """

    def __init__(self, channel: RankChannel, report: Callable[[int, Exception], None]) -> None:
        self._channel = channel
        self._report = report
        self._steps: queue.SimpleQueue[LaunchedStep | None] = queue.SimpleQueue()
        self._failure: Exception | None = None
        # It may hang in a collective of a device; nobody waits for it then.
        threading.Thread(target=self._run, name="results", daemon=True).start()

    def put(self, step: LaunchedStep) -> None:
        self._steps.put(step)

    def raise_failure(self) -> None:
        """Raises it, where there was one."""
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """The thread ends when it has answered what was put."""
        self._steps.put(None)

    def _run(self) -> None:
        while (step := self._steps.get()) is not None:
            try:
                self._channel.send(encode(step.finish()))
            except ChannelClosed:
                return  # whoever waits for a plan hears of it too
            except Exception as error:  # noqa: BLE001  (raised again by the thread that launches)
                self._failure = error
                self._report(step.step, error)
                self._channel.close()
                return
