"""Fans plans out on a host that is not the leader's: one connection to the leader speaks for all ranks of this host.

It runs as three threads in the process of the host's first rank; that rank too connects to it, as the others do. One
of them tells the leader regularly where the ranks are, as long as any of them works. When the leader is gone, the relay
closes its hub and all ranks of the host exit; when the relay's process dies, the leader sees all ranks of the host end.
"""

import contextlib
import threading
from collections.abc import Sequence

from engine.errors import RankFailure
from engine.executor.channel import ChannelClosed
from engine.executor.frames import FrameKind
from engine.executor.progress_area import encode_samples
from engine.executor.socket_hub import SocketHub
from engine.executor.socket_rank import SocketRankChannel
from engine.progress import Operation

REPORT_INTERVAL_S = 0.25
_IDLE_REPORTS = 20
"""Then a relay falls silent until the next plan. Enough that a rank which never takes a plan is seen by then."""


class HostRelay:
    """Args:
    leader_address, secret, timeout_s: as of SocketRankChannel.
    local_address: where this host's ranks find the relay.
    ranks: those of this host.
    """

    def __init__(
        self, leader_address: str, local_address: str, secret: str, ranks: Sequence[int], timeout_s: float
    ) -> None:
        self._hub = SocketHub(ranks, secret, [local_address])
        try:
            self._leader = SocketRankChannel(leader_address, secret, ranks, timeout_s)
        except ChannelClosed:
            self._hub.close()
            raise
        self._rank = ranks[0]
        self._is_over = threading.Event()
        self._has_plan = threading.Event()
        """Set while ranks have something to do; they begin with their start."""
        self._has_plan.set()
        self._lost = {rank: threading.Event() for rank in ranks}
        self._threads = [
            threading.Thread(target=self._down, name="relay-down", daemon=True),
            threading.Thread(target=self._up, name="relay-up", daemon=True),
            threading.Thread(target=self._report, name="relay-report", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def _down(self) -> None:
        try:
            while True:
                data = self._leader.receive(None)
                self._hub.send(data)
                if not self._has_plan.is_set():
                    self._has_plan.set()
        except (ChannelClosed, RankFailure):
            # A rank that is gone is reported by _up, in order behind what it sent.
            self._leader.wait_closed()
        finally:
            self._hub.close()
            self._is_over.set()
            self._has_plan.set()

    def _report(self) -> None:
        """Every REPORT_INTERVAL_S; nothing where all ranks have waited for a plan for a while."""
        num_idle = 0
        while self._has_plan.wait() and not self._is_over.wait(REPORT_INTERVAL_S):
            samples = self._hub.progress()
            is_idle = all(sample.operation == Operation.IDLE for sample in samples)
            num_idle = num_idle + 1 if is_idle else 0
            if num_idle >= _IDLE_REPORTS:
                num_idle = 0
                self._has_plan.clear()
            with contextlib.suppress(ChannelClosed):  # the other threads end the relay
                self._leader.send_frame(FrameKind.PROGRESS, self._rank, encode_samples(samples))

    def _up(self) -> None:
        try:
            while True:
                try:
                    rank, data = self._hub.receive(None)
                    self._leader.send_frame(FrameKind.MESSAGE, rank, data)
                except RankFailure as error:
                    assert error.rank is not None
                    self._leader.send_frame(FrameKind.LOST, error.rank, str(error).encode())
                    self._lost[error.rank].set()
        except ChannelClosed:
            pass
        finally:
            for lost in self._lost.values():
                lost.set()

    def wait_lost(self, rank: int, timeout_s: float) -> None:
        """Returns when all that ``rank`` sent before it closed its channel is on its way to the leader."""
        self._lost[rank].wait(timeout_s)

    def close(self) -> None:
        self._leader.close()
        for thread in self._threads:
            thread.join(5.0)
