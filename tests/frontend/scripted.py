"""A backend that answers by script, and a clock that a test moves."""

import asyncio
import heapq
import itertools
from array import array
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

from cluster.errors import UnknownStream
from cluster.frontend.stored_call import FoundCall
from cluster.types import ReplicaInfo, ReplicaState
from engine.errors import InvalidRequest
from engine.request import FinishReason, Output, Request, TopLogprobs

Script = Callable[[Request], AsyncGenerator[Output, None]]


def replica_info(state: ReplicaState = ReplicaState.READY, **changes: object) -> ReplicaInfo:
    values: dict[str, object] = {
        "id": "r0",
        "model": "m",
        "state": state,
        "address": "127.0.0.1:1",
        "incarnation": 1,
        "max_model_len": 512,
        "max_num_seqs": 8,
        "block_size": 16,
        "num_blocks": 64,
    }
    return ReplicaInfo(**{**values, **changes})  # type: ignore[arg-type]


class ScriptedBackend:
    """Runs ``script`` for every request and writes down what happened."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.infos: list[ReplicaInfo] = [replica_info()]
        self.requests: list[Request] = []
        self.live: set[str] = set()
        self.aborted: list[str] = []
        self.drained: list[str] = []
        self.changed = asyncio.Event()

    async def generate(
        self, request: Request, keep: object = None, holder: object = None
    ) -> AsyncGenerator[Output, None]:
        assert request.request_id not in self.live
        self.requests.append(request)
        self.live.add(request.request_id)
        self.changed.set()
        is_done = False
        try:
            async for output in self.script(request):
                is_done = output.finish_reason is not None
                yield output
        finally:
            self.live.discard(request.request_id)
            if not is_done:
                self.aborted.append(request.request_id)
            self.changed.set()

    async def find(self, call_id: str) -> FoundCall:
        raise UnknownStream(f"nobody has the request {call_id!r}")

    def abandon(self, found: FoundCall) -> None:
        raise NotImplementedError("what nobody has is abandoned by nobody")

    def replicas(self) -> Sequence[ReplicaInfo]:
        return self.infos

    async def dump(self, replica: str) -> AsyncGenerator[bytes, None]:
        """The name of the replica, in two parts."""
        for part in (replica[:1], replica[1:]):
            yield part.encode()

    async def drain(self, replica: str) -> None:
        if replica not in {info.id for info in self.infos}:
            raise InvalidRequest(f"there is no replica {replica!r}", "replica")
        self.drained.append(replica)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for an event-driven condition over this backend's records."""
        while not condition():
            self.changed.clear()
            await asyncio.wait_for(self.changed.wait(), 10)


def says(
    token_ids: Sequence[int],
    sizes: Sequence[int] = (),
    stop_token_id: int | None = None,
    num_cached_tokens: int = 0,
) -> Script:
    """Gives ``token_ids`` in outputs of the given sizes (then one by one), as far as ``max_tokens`` goes. Where
    log-probabilities are asked for, token t has -t/1000 and its alternatives are t + 1, t + 2, … Embeddings are
    ``embedding_of`` the prompt."""

    def logprobs(ids: Sequence[int], count: int | None) -> list[TopLogprobs] | None:
        return None if count is None else [_logprobs(token_id, count) for token_id in ids]

    async def script(request: Request) -> AsyncGenerator[Output, None]:
        sampling = request.sampling
        if sampling.pooling is not None:
            yield Output(request.request_id, [], FinishReason.STOP, pooled=embedding_of(request.token_ids).tobytes())
            return
        if sampling.prompt_logprobs is not None:
            prompt = logprobs(request.token_ids[1:], sampling.prompt_logprobs) or []
            half = len(prompt) // 2
            yield Output(request.request_id, [], prompt_logprobs=[None, *prompt[:half]])
            yield Output(request.request_id, [], prompt_logprobs=[*prompt[half:]])
        rest = list(token_ids)
        if stop_token_id is not None:
            rest.append(stop_token_id)
        is_cut = len(rest) > sampling.max_tokens
        rest = rest[: sampling.max_tokens]
        plan = list(sizes)
        while True:
            size = max(plan.pop(0), 1) if plan else 1
            part, rest = rest[:size], rest[size:]
            ends = not rest
            stops = ends and stop_token_id is not None and not is_cut
            reason = (FinishReason.STOP if stops else FinishReason.LENGTH) if ends else None
            yield Output(
                request.request_id,
                part,
                finish_reason=reason,
                stop_token_id=stop_token_id if stops else None,
                logprobs=logprobs(part, sampling.logprobs),
                num_cached_tokens=num_cached_tokens if ends else 0,
            )
            if ends:
                return
            await asyncio.sleep(0)

    return script


def embedding_of(token_ids: Sequence[int]) -> "array[float]":
    """As long as remuda-tiny's: a half of it is in one place, which the tokens choose."""
    values = [0.5] + [0.75**0.5 / 255**0.5] * 255
    place = sum(token_ids) % 256
    return array("f", values[-place:] + values[:-place])


def _logprobs(token_id: int, count: int) -> TopLogprobs:
    alternatives = [token_id + 1 + index for index in range(count)]
    return TopLogprobs(-token_id / 1000, 1, alternatives, [-other / 1000 for other in alternatives])


@dataclass
class Gate:
    """Says ``before``, then waits until the test opens it, then says ``after``."""

    before: Sequence[int] = ()
    after: Sequence[int] = ()
    opened: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, request: Request) -> AsyncGenerator[Output, None]:
        for token_id in self.before:
            yield Output(request.request_id, [token_id])
        await self.opened.wait()
        for token_id in self.after[:-1]:
            yield Output(request.request_id, [token_id])
        yield Output(request.request_id, list(self.after[-1:]), finish_reason=FinishReason.LENGTH)


class FakeTimer:
    def __init__(self) -> None:
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


class FakeClock:
    """Time stands still until ``advance``."""

    def __init__(self) -> None:
        self._now_s = 100.0
        self._order = itertools.count()
        self._queue: list[tuple[float, int, FakeTimer, Callable[[], None]]] = []

    def now_s(self) -> float:
        return self._now_s

    def call_at(self, when_s: float, callback: Callable[[], None]) -> FakeTimer:
        timer = FakeTimer()
        heapq.heappush(self._queue, (when_s, next(self._order), timer, callback))
        return timer

    def advance(self, seconds: float) -> None:
        self._now_s += seconds
        while self._queue and self._queue[0][0] <= self._now_s:
            _, _, timer, callback = heapq.heappop(self._queue)
            if not timer.is_cancelled:
                callback()

    @property
    def num_armed(self) -> int:
        return sum(not timer.is_cancelled for _, _, timer, _ in self._queue)
