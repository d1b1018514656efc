"""An engine without scheduler, ranks and model: each step gives every running request one token."""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from engine.engine import EngineStats
from engine.errors import AdapterError
from engine.outputs import Outputs
from engine.request import AdapterInfo, FinishReason, Output, Request

FIRST_TOKEN_ID = 300
NUM_TOKEN_IDS = 1000
"""Its answers are remuda-tiny's tokens 300 to 1299 over and over: pieces of ordinary text."""


class Pace:
    """Steps due at absolute times, ``step_s`` apart: one that comes late takes nothing from those behind it, so a path
    that cannot keep up shows it in delays and not in a lower rate."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._due_s: float | None = None

    def wait_s(self, now_s: float) -> float:
        """Seconds until the next step is due, 0 where it is late. The first one after a rest is due at once."""
        due_s = now_s if self._due_s is None else self._due_s
        self._due_s = due_s + self._step_s
        return max(due_s - now_s, 0.0)

    def rest(self) -> None:
        """Nothing runs: what would have been due meanwhile never was."""
        self._due_s = None


class MockEngine:
    """Follows engine.engine.Engine's contract.

    Args:
        step_s: steps are due that far apart, at absolute times. 0: the next step begins when the event loop has handled
            the last one's outputs, so that each step's tokens travel by themselves and the rate is what the path can
            carry.
        event_loop: that of the leader's server.
    """

    def __init__(self, step_s: float, event_loop: asyncio.AbstractEventLoop) -> None:
        self._pace = Pace(step_s) if step_s > 0 else None
        self._event_loop = event_loop
        self._handled = threading.Event()
        self._live: dict[str, list[int]] = {}
        """Request id → [tokens still to give, next token]."""
        self._ended: list[Output] = []
        self._num_steps = 0

    @property
    def has_work(self) -> bool:
        return bool(self._live or self._ended)

    def add(self, request: Request) -> None:
        self._live[request.request_id] = [request.sampling.max_tokens, FIRST_TOKEN_ID]

    def abort(self, request_id: str) -> bool:
        if self._live.pop(request_id, None) is None:
            return False
        self._ended.append(Output(request_id, [], FinishReason.ABORT))
        return True

    def step(self, news: Callable[[], None] = lambda: None) -> Outputs:
        self._wait()
        self._num_steps += 1
        outputs, self._ended = Outputs(self._ended), []
        for request_id, state in self._live.items():
            left, token_id = state
            state[0], state[1] = left - 1, FIRST_TOKEN_ID + (token_id + 1 - FIRST_TOKEN_ID) % NUM_TOKEN_IDS
            if left == 1:
                outputs.append(Output(request_id, [token_id], FinishReason.LENGTH))
            else:
                outputs.request_ids.append(request_id)
                outputs.token_ids.append(token_id)
        if outputs.others:
            self._live = {request_id: state for request_id, state in self._live.items() if state[0] > 0}
        if self._pace is not None and not self._live:
            self._pace.rest()
        return outputs

    def load_adapter(self, name: str, path: str) -> "Future[AdapterInfo]":
        raise AdapterError("this engine computes nothing, so it has no adapters")

    def unload_adapter(self, name: str) -> "Future[None]":
        raise AdapterError("this engine computes nothing, so it has no adapters")

    @property
    def adapters(self) -> tuple[AdapterInfo, ...]:
        return ()

    def _wait(self) -> None:
        if self._pace is not None:
            time.sleep(self._pace.wait_s(time.monotonic()))
            return
        self._handled.clear()
        self._event_loop.call_soon_threadsafe(self._handled.set)
        self._handled.wait()

    def stats(self) -> EngineStats:
        return EngineStats(len(self._live), 0, 0, 1, 0, self._num_steps, 0)
