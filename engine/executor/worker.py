"""The whole life of a rank: connect, meet the others, load, allocate, answer plans, leave.

The same in a plain process, in a Ray actor and in a thread of the leader. torch is imported only once the leader is
connected, so that a wrong address or secret shows at once, and the seconds of the import are counted.
"""

import contextlib
import os
import socket
import threading
import time
import traceback

import setproctitle

from engine.errors import RankFailure, RemudaError
from engine.executor.channel import ChannelClosed, RankChannel
from engine.executor.relay import HostRelay
from engine.executor.socket_rank import SocketRankChannel
from engine.executor.worker_config import WorkerConfig
from engine.messages import Hello, LoadProgress, RankError, StepPlan, encode

__all__ = ["WorkerConfig", "run_worker", "serve_rank"]

_EXIT_GRACE_S = 5.0
"""How long a rank whose leader is gone may take to leave by itself; it may hang in a collective."""


def run_worker(config: WorkerConfig) -> None:
    """A rank that has this process to itself. Returns when the leader says so or is gone.

    Raises what went wrong, after it has been reported to the leader; the process should then exit with status 1.
    Where the leader is gone and the rank hangs, the process ends itself.
    """
    setproctitle.setproctitle(f"remuda: rank {config.rank}")
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
        channel = SocketRankChannel(config.channel_address, config.secret, [config.rank], config.connect_timeout_s)
        cleanup.callback(channel.close)
        finished = threading.Event()
        cleanup.callback(finished.set)
        threading.Thread(target=_watch_leader, args=(channel, finished), name="leader-watch", daemon=True).start()
        serve_rank(config, channel)


def serve_rank(config: WorkerConfig, channel: RankChannel) -> None:
    """The rank itself, over an open channel. Returns when the leader says so or is gone; raises what went wrong."""
    step = -1
    try:
        channel.send(encode(Hello(config.epoch, config.rank, os.getpid(), socket.gethostname(), config.device)))
        channel.send(encode(LoadProgress(config.rank, "import")))
        began = time.perf_counter()
        from engine.executor.rank_startup import start_rank

        runner = start_rank(config, channel, import_seconds=time.perf_counter() - began)
        while runner is not None:
            message = runner.next_message()
            if not isinstance(message, StepPlan):
                return
            step = message.step
            channel.send(encode(runner.execute(message)))
    except ChannelClosed:
        return
    except Exception as error:
        _report(config, channel, step, error)
        raise


def _report(config: WorkerConfig, channel: RankChannel, step: int, error: Exception) -> None:
    if isinstance(error, RemudaError):
        kind, message = type(error).__name__, str(error)
    else:
        kind, message = "EngineFailure", f"{type(error).__name__}: {error}"
    detail = "".join(traceback.format_exception(error))
    culprit = error.rank if isinstance(error, RankFailure) else None
    with contextlib.suppress(ChannelClosed):  # the leader is gone; the caller still sees the error itself
        channel.send(encode(RankError(config.epoch, step, config.rank, kind, message, detail, culprit)))


def _watch_leader(channel: RankChannel, finished: threading.Event) -> None:
    channel.wait_closed()
    if not finished.wait(_EXIT_GRACE_S):
        os._exit(1)
