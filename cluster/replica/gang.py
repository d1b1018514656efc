"""The leader's side of its gang, through all formations."""

import contextlib
import threading
import time
from collections.abc import Callable

from cluster.replica.events import Event, GangBroke, GangFormed
from cluster.replica.rank_plan import GangEndpoints, listen_addresses
from engine.config import ParallelConfig
from engine.errors import EngineFailure, RankFailure, RemudaError
from engine.executor.channel_executor import ChannelExecutor
from engine.executor.flight_record import FlightRecord
from engine.executor.gang_start import GangReady
from engine.executor.handshake import new_secret
from engine.executor.rank_times import RankTimes
from engine.executor.socket_hub import SocketHub

PATIENCE_S = 120.0
"""So long a leader whose gang broke waits for its supervisor to open the next formation, or to say that it will."""

StartGang = Callable[[int, ChannelExecutor], GangReady]
"""Start the ranks of this epoch; raises what went wrong."""


class Gang:
    """Args:
    replica_id, host: of the leader.
    tell: takes events for the supervisor.
    on_failure: called from any thread when formations up to this epoch are over, with the reason.
    host_of: names a rank's host, for people.
    """

    def __init__(
        self,
        replica_id: str,
        parallel: ParallelConfig,
        host: str,
        tell: Callable[[Event], None],
        on_failure: Callable[[int, RemudaError], None],
        host_of: Callable[[int], str],
    ) -> None:
        self._host_of = host_of
        self._replica_id = replica_id
        self._parallel = parallel
        self._host = host
        self._tell = tell
        self._on_failure = on_failure
        self.record = FlightRecord()
        self.times = RankTimes(parallel.num_ranks)
        """Both over all formations."""
        self._changed = threading.Condition()
        self._epoch = -1
        self._executor: ChannelExecutor | None = None
        """Of the present formation."""
        self._is_new = False
        """Nobody has started it yet."""
        self._is_closed = False
        self._heard_s = 0.0
        """When somebody waited last, or was told to stay."""

    def open(self, epoch: int, rank_hosts: list[str]) -> GangEndpoints:
        """Listen for the ranks of a new formation; the one before is over. From any thread."""
        secret = new_secret()
        hub = SocketHub(range(self._parallel.num_ranks), secret, listen_addresses(self._host, rank_hosts))
        executor = ChannelExecutor(
            hub,
            self._parallel,
            epoch=epoch,
            record=self.record,
            times=self.times,
            on_failure=lambda error: self._on_failure(epoch, error),
            host_of=self._host_of,
        )
        with self._changed:
            assert epoch > self._epoch, f"epoch {epoch} does not follow {self._epoch}"
            former, self._executor = self._executor, executor
            self._epoch, self._is_new = epoch, True
            self._changed.notify_all()
        if former is not None:
            former.disband()
            # The engine may be idle, and so wait for nothing of the former formation.
            self._on_failure(epoch - 1, RankFailure(f"the gang forms anew, as epoch {epoch}"))
        local = next((address for address in hub.addresses if address.startswith("unix:")), "")
        remote = next((address for address in hub.addresses if address.startswith("tcp:")), "")
        return GangEndpoints(self._host, local, remote, secret)

    def stay(self) -> None:
        """A formation will be opened, later: whoever opens it waits for something itself. From any thread."""
        with self._changed:
            self._heard_s = time.monotonic()

    def form(self, start: StartGang) -> tuple[int, ChannelExecutor, GangReady]:
        """Waits for a formation and starts it, again and again until one is ready.

        Raises what no other formation would mend (CheckpointError, DoesNotFit, StartFailed, …), and EngineFailure where
        nobody opens one in time, or the gang was closed.
        """
        while True:
            epoch, executor = self._take()
            try:
                ready = start(epoch, executor)
            except EngineFailure as error:
                self.end(epoch, executor, error)
                continue
            new = [loaded for loaded in ready.loaded if loaded.is_newcomer]
            weight_bytes = {
                "peers": sum(loaded.num_bytes_from_peers for loaded in new),
                "disk": sum(loaded.num_bytes_from_disk for loaded in new),
            }
            self._tell(GangFormed(self._replica_id, epoch, ready.cache.num_blocks, ready.phase_seconds, weight_bytes))
            return epoch, executor, ready

    def _take(self) -> tuple[int, ChannelExecutor]:
        with self._changed:
            self._heard_s = time.monotonic()
            while not (self._is_new or self._is_closed):
                left_s = self._heard_s + PATIENCE_S - time.monotonic()
                if left_s <= 0:
                    raise EngineFailure(f"the gang broke, and nobody repaired it for {PATIENCE_S:g} s")
                self._changed.wait(left_s)
            if self._is_closed or self._executor is None:
                raise EngineFailure("the gang was closed")
            self._is_new = False
            return self._epoch, self._executor

    def end(self, epoch: int, executor: ChannelExecutor, error: RemudaError) -> None:
        """The formation broke: free its ranks, and have the supervisor see to the next one."""
        executor.disband()
        with self._changed:
            is_present = executor is self._executor and not self._is_new and not self._is_closed
        if is_present:
            culprit = error.rank if isinstance(error, RankFailure) else None
            self._tell(GangBroke(self._replica_id, epoch, culprit, str(error)))

    def close(self) -> None:
        """Ends the ranks, and whoever waits in ``form``. From any thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._executor is not None:
            with contextlib.suppress(RemudaError):
                self._executor.close()
