"""Brings the ranks of one gang from connected to ready."""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.config import CacheConfig
from engine.errors import ProtocolViolation, RankFailure
from engine.executor.blame import find_culprit
from engine.executor.cache_size import size_cache
from engine.executor.channel import LeaderChannel
from engine.executor.rank_message import decode_message
from engine.executor.start_watch import StartWatch
from engine.messages import (
    Hello,
    InitCache,
    LayerExperts,
    Loaded,
    LoadProgress,
    RankError,
    Ready,
    encode,
)
from engine.model_config import ModelConfig, kv_groups

_LOOK_INTERVAL_S = 0.5

StartMessage = Hello | LoadProgress | Loaded | Ready
OnMessage = Callable[[StartMessage], None]
"""Called with every message of the start, from the thread that starts."""


@dataclass(frozen=True)
class GangReady:
    """What the start of a gang found out. Tuples are by rank; ``phase_seconds``: of the slowest rank in each phase."""

    cache: CacheConfig
    max_model_len: int
    ranks: tuple[Hello, ...]
    loaded: tuple[Loaded, ...]
    phase_seconds: dict[str, float]

    @property
    def weight_bytes(self) -> tuple[int, ...]:
        return tuple(message.weight_bytes for message in self.loaded)


class GangStart:
    """One start of one gang. ``check_processes``: raises RankFailure where a rank's process has ended, whether it has
    connected or not."""

    def __init__(
        self,
        channel: LeaderChannel,
        num_ranks: int,
        epoch: int,
        stall_timeout_s: float,
        on_message: OnMessage,
        check_processes: Callable[[], None] = lambda: None,
    ) -> None:
        self._channel = channel
        self._num_ranks = num_ranks
        self._epoch = epoch
        self._stall_timeout_s = stall_timeout_s
        self._check_processes = check_processes
        self._on_message = on_message
        self._hellos: dict[int, Hello] = {}
        self._loaded: dict[int, Loaded] = {}
        self._ready: dict[int, Ready] = {}
        self._watch = StartWatch()
        self._next_look_s = 0.0

    def run(
        self,
        model: ModelConfig,
        pp: int,
        block_size: int,
        max_model_len: int | None,
        experts: Sequence[LayerExperts] = (),
    ) -> GangReady:
        """``pp``: pipeline stages. ``experts``: see InitCache.

        Raises what a rank raised, RankFailure, ProtocolViolation or DoesNotFit.
        """
        while len(self._loaded) < self._num_ranks:
            self._take()
        size = size_cache(
            list(self._loaded.values()), kv_groups(model, pp), block_size, model.max_context_len, max_model_len
        )
        with contextlib.suppress(RankFailure):  # to be received below, behind what the rank said before
            self._channel.send(encode(InitCache(self._epoch, size.num_blocks, size.max_model_len, list(experts))))
        while len(self._ready) < self._num_ranks:
            self._take()
        ready = [self._ready[rank] for rank in sorted(self._ready)]
        phases = dict.fromkeys(phase for message in ready for phase in message.phase_seconds)
        return GangReady(
            cache=CacheConfig(block_size, size.num_blocks, keeps_prefixes=not model.rope.depends_on_prompt_length),
            max_model_len=size.max_model_len,
            ranks=tuple(self._hellos[rank] for rank in sorted(self._hellos)),
            loaded=tuple(self._loaded[rank] for rank in sorted(self._loaded)),
            phase_seconds={phase: max(message.phase_seconds.get(phase, 0.0) for message in ready) for phase in phases},
        )

    def _receive(self) -> tuple[int, bytes]:
        """Looks now and then whether the ranks can still go on."""
        deadline_s = time.monotonic() + self._stall_timeout_s
        while (left_s := deadline_s - time.monotonic()) > 0:
            if time.monotonic() >= self._next_look_s:
                self._look()
            try:
                return self._channel.receive(min(_LOOK_INTERVAL_S, left_s))
            except TimeoutError:
                # Only now: what a rank said before it ended is the better reason.
                self._check_processes()
        awaited = self._ready if len(self._loaded) == self._num_ranks else self._loaded
        missing = [rank for rank in range(self._num_ranks) if rank not in awaited]
        raise RankFailure(
            f"no rank reported anything for {self._stall_timeout_s:g} s of the start; not ready: rank "
            f"{', '.join(map(str, missing))}",
            missing[0] if len(missing) == 1 else None,
        )

    def _look(self) -> None:
        now_s = time.monotonic()
        self._next_look_s = now_s + _LOOK_INTERVAL_S
        if (failure := self._watch.observe(now_s, self._channel.progress())) is not None:
            raise failure

    def _take(self) -> None:
        rank, data = self._receive()
        message = decode_message(data, rank)
        if isinstance(message, RankError):
            raise find_culprit(self._channel, message, self._num_ranks)
        if isinstance(message, Hello):
            if message.epoch != self._epoch:
                raise ProtocolViolation(f"rank {rank} is of epoch {message.epoch}, not {self._epoch}")
            self._hellos[rank] = message
        elif isinstance(message, Loaded):
            self._loaded[rank] = message
        elif isinstance(message, Ready):
            self._ready[rank] = message
        elif not isinstance(message, LoadProgress):
            raise ProtocolViolation(f"rank {rank} answers a plan before any was sent")
        self._on_message(message)
