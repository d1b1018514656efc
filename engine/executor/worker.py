"""The whole life of a rank: connect, meet the others, load, allocate, answer plans, and again with the next formation.

The same in a plain process, in a Ray actor and in a thread of the leader. torch is imported only once the leader is
connected, so that a wrong address or secret shows at once, and the seconds of the import are counted.
"""

import contextlib
import functools
import os
import socket
import threading
import time
import traceback
from typing import TYPE_CHECKING

import setproctitle

from engine.errors import RankFailure, RemudaError
from engine.executor.channel import ChannelClosed, RankChannel
from engine.executor.formations import Formations
from engine.executor.relay import HostRelay
from engine.executor.socket_rank import SocketRankChannel
from engine.executor.worker_config import WorkerConfig
from engine.messages import Hello, LoadProgress, RankError, StepPlan, encode
from engine.parallel.formation_end import FormationEnd

if TYPE_CHECKING:
    from engine.executor.rank_startup import Rank

__all__ = ["WorkerConfig", "run_worker", "serve_rank"]

_EXIT_GRACE_S = 5.0
"""How long a rank whose leader is gone may take to leave its formation; it may hang in a collective."""


def run_worker(formations: Formations) -> None:
    """A rank that has this process to itself, through all its formations. Returns when a leader says so, or when it is
    left without a formation.

    What went wrong is reported to the leader. A failure of the gang ends the formation; the rank keeps its weights and
    waits for the next one. Any other is this rank's own: it is raised, and the process should then exit with status 1.
    Where the leader is gone and the rank hangs, the process ends itself.
    """
    life, failure = _Life(), None
    while (config := formations.take()) is not None:
        setproctitle.setproctitle(f"remuda: rank {config.rank}")
        failure = None
        try:
            if _run_formation(config, life, formations):
                return
        except (RankFailure, ChannelClosed) as error:
            # Not the error itself: its trace holds what the formation used.
            failure = type(error)(str(error))
    if failure is not None:
        raise failure


def serve_rank(config: WorkerConfig, channel: RankChannel) -> None:
    """A rank of one formation, over an open channel. Returns when the leader says so or is gone; raises what went
    wrong."""
    _Life().serve(config, channel, FormationEnd())


def _run_formation(config: WorkerConfig, life: "_Life", formations: Formations) -> bool:
    """True: the leader ordered the rank to leave. Raises RankFailure where the formation failed."""
    with contextlib.ExitStack() as cleanup:
        if config.relay is not None:
            relay = HostRelay(
                config.relay.leader_address,
                config.channel_address,
                config.secret,
                config.relay.ranks,
                config.connect_timeout_s,
            )
            cleanup.callback(relay.close)
            cleanup.callback(relay.wait_lost, config.rank, _EXIT_GRACE_S)
        channel = SocketRankChannel(
            config.channel_address,
            config.secret,
            [config.rank],
            config.connect_timeout_s,
            give_up=lambda: formations.has_next,
        )
        cleanup.callback(channel.close)
        formations.interrupt_with(channel.close)
        end, finished = FormationEnd(), threading.Event()
        cleanup.callback(finished.set)
        threading.Thread(
            target=_watch_leader, args=(channel, end, life, finished), name="leader-watch", daemon=True
        ).start()
        return life.serve(config, channel, end)


class _Life:
    """What outlives a formation."""

    def __init__(self) -> None:
        self._rank: Rank | None = None

    @property
    def is_loading(self) -> bool:
        """It is not stuck, however long it takes: nobody waits for it in a collective."""
        return self._rank is not None and self._rank.weights.is_loading

    def serve(self, config: WorkerConfig, channel: RankChannel, end: FormationEnd) -> bool:
        """One formation. True: the leader ordered the rank to leave. False: the leader is gone. Raises what went
        wrong."""
        step = -1
        try:
            host = socket.gethostname()
            channel.send(encode(Hello(config.epoch, config.rank, os.getpid(), host, config.device, config.runs)))
            if self._rank is None:
                channel.send(encode(LoadProgress(config.rank, "import")))
                began = time.perf_counter()
                from engine.executor.rank_startup import Rank

                self._rank = Rank(config, import_seconds=time.perf_counter() - began)
            rank = self._rank.join(config, channel, end)
            if rank is None:
                return True
            with rank.answering(functools.partial(_report, config, channel)):
                while isinstance(message := rank.next_message(), StepPlan):
                    step = message.step
                    rank.answer(message)
            return True
        except ChannelClosed:
            return False
        except Exception as error:
            _report(config, channel, step, error)
            if end.has_aborted:
                raise RankFailure("the formation was ended") from error
            raise
        finally:
            end.close()


def _report(config: WorkerConfig, channel: RankChannel, step: int, error: Exception) -> None:
    if isinstance(error, RemudaError):
        kind, message = type(error).__name__, str(error)
    else:
        kind, message = "EngineFailure", f"{type(error).__name__}: {error}"
    detail = "".join(traceback.format_exception(error))
    culprit = error.rank if isinstance(error, RankFailure) else None
    with contextlib.suppress(ChannelClosed):  # the leader is gone; the caller still sees the error itself
        channel.send(encode(RankError(config.epoch, step, config.rank, kind, message, detail, culprit)))


def _watch_leader(channel: RankChannel, end: FormationEnd, life: _Life, finished: threading.Event) -> None:
    channel.wait_closed()
    end.abort()
    while not finished.wait(_EXIT_GRACE_S):
        if not life.is_loading:
            os._exit(1)
