"""An engine without scheduler and model: each step gives every request its next token, which anyone can predict."""

import threading
from array import array
from collections.abc import Callable
from concurrent.futures import Future

from engine.engine import EngineStats
from engine.errors import AdapterError, InvalidRequest
from engine.request import AdapterInfo, FinishReason, Output, Request


def token_at(request: Request, index: int) -> int:
    """Token number ``index`` (from 0) of the answer to ``request``."""
    prompt = request.token_ids[: request.num_prompt_tokens]
    return (sum(prompt[:8]) * 31 + len(prompt) + index * 7 + request.sampling.seed) % 50_000


def embedding_at(request: Request) -> bytes:
    """The embedding of ``request``: four bytes, of its first token."""
    return array("f", [token_at(request, 0)]).tobytes()


def answer(request: Request) -> list[int]:
    return [token_at(request, index) for index in range(request.sampling.max_tokens)]


class ScriptedEngine:
    """Follows engine.engine.Engine's contract.

    ``gate``: steps wait while it is clear. ``fails_with``: the next step raises it. ``refuses``: request id → what
    ``add`` raises. ``tokens_per_step``: as if a step computed several.
    """

    def __init__(self, tokens_per_step: int = 1) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.fails_with: BaseException | None = None
        self.refuses: dict[str, BaseException] = {}
        self.aborted: list[str] = []
        self.num_steps = 0
        self._tokens_per_step = tokens_per_step
        self._live: dict[str, tuple[Request, int]] = {}
        self._outputs: list[Output] = []
        self.broken_paths: set[str] = set()
        self._adapters: dict[str, AdapterInfo] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._live or self._outputs)

    def add(self, request: Request) -> None:
        if (error := self.refuses.get(request.request_id)) is not None:
            raise error
        if not request.token_ids:
            raise InvalidRequest("the prompt is empty; give at least one token", "prompt")
        self._live[request.request_id] = (request, len(request.token_ids) - request.num_prompt_tokens)

    def abort(self, request_id: str) -> bool:
        if self._live.pop(request_id, None) is None:
            return False
        self.aborted.append(request_id)
        self._outputs.append(Output(request_id, [], FinishReason.ABORT))
        return True

    def step(self, news: Callable[[], None] = lambda: None) -> list[Output]:
        self.entered.set()
        self.gate.wait()
        self.num_steps += 1
        if self.fails_with is not None:
            raise self.fails_with
        outputs, self._outputs = self._outputs, []
        for request_id, (request, start) in list(self._live.items()):
            end = min(start + self._tokens_per_step, request.sampling.max_tokens)
            tokens = [token_at(request, index) for index in range(start, end)]
            if end == request.sampling.max_tokens:
                del self._live[request_id]
                pooled = None if request.sampling.pooling is None else embedding_at(request)
                outputs.append(Output(request_id, tokens, FinishReason.LENGTH, pooled=pooled))
            else:
                self._live[request_id] = (request, end)
                outputs.append(Output(request_id, tokens))
        return outputs

    def load_adapter(self, name: str, path: str) -> "Future[AdapterInfo]":
        """At once; one of ``broken_paths`` fails as if a rank could not read it."""
        if name in self._adapters:
            raise AdapterError(f"{name} is loaded already")
        future: Future[AdapterInfo] = Future()
        if path in self.broken_paths:
            future.set_exception(AdapterError(f"{path} is broken"))
        else:
            self._adapters[name] = AdapterInfo(name, path, 1000)
            future.set_result(self._adapters[name])
        return future

    def unload_adapter(self, name: str) -> "Future[None]":
        if name not in self._adapters:
            raise AdapterError(f"there is no {name}")
        del self._adapters[name]
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @property
    def adapters(self) -> tuple[AdapterInfo, ...]:
        return tuple(self._adapters.values())

    @property
    def num_live(self) -> int:
        return len(self._live)

    def stats(self) -> EngineStats:
        return EngineStats(len(self._live), 0, 0, 100, min(len(self._live), 100), self.num_steps, 0)
