"""What a front end knows of its replicas, for routing. Pure: who asks the leaders, and when, is decided elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.types import ReplicaInfo, ReplicaState


@dataclass(frozen=True)
class ReplicaView:
    """One replica as filters and scorers see it.

    ``num_sent``: requests that this front end sent there since ``info`` was taken, and that its gauges cannot know.
    """

    info: ReplicaInfo
    is_connected: bool = True
    num_sent: int = 0

    @property
    def id(self) -> str:
        return self.info.id

    @property
    def is_ready(self) -> bool:
        return self.is_connected and self.info.state is ReplicaState.READY

    @property
    def takes_requests(self) -> bool:
        """At once, or when it has been repaired."""
        return self.is_connected and self.info.state.takes_requests

    @property
    def load(self) -> int:
        """Requests running and waiting, as well as this front end can know."""
        return self.info.num_running + self.info.num_waiting + self.num_sent


class ReplicaTable:
    """The replicas by id. Belongs to the event loop's thread."""

    def __init__(self) -> None:
        self._views: dict[str, ReplicaView] = {}

    def update(self, info: ReplicaInfo) -> None:
        """News from a leader. A replica seen for the first time joins."""
        self._views[info.id] = ReplicaView(info)

    def disconnect(self, replica_id: str) -> None:
        """The stream to the leader broke: nothing goes there before the next ``update``."""
        view = self._views.get(replica_id)
        if view is not None:
            self._views[replica_id] = ReplicaView(view.info, is_connected=False)

    def remove(self, replica_id: str) -> None:
        """The replica left the deployment."""
        self._views.pop(replica_id, None)

    def note_sent(self, replica_id: str) -> None:
        """A request went there. Without this, all requests between two updates would go to the same replica."""
        view = self._views.get(replica_id)
        if view is not None:
            self._views[replica_id] = ReplicaView(view.info, view.is_connected, view.num_sent + 1)

    def views(self) -> Sequence[ReplicaView]:
        return tuple(self._views.values())

    def get(self, replica_id: str) -> ReplicaView | None:
        return self._views.get(replica_id)
