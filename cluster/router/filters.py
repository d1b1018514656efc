"""Which replicas may take a request at all."""

from collections.abc import Sequence
from typing import Protocol

from cluster.router.query import RoutingQuery
from cluster.router.replica_table import ReplicaView


class Filter(Protocol):
    def keep(self, query: RoutingQuery, replicas: Sequence[ReplicaView]) -> Sequence[ReplicaView]:
        """A part of ``replicas``, in their order."""
        ...


class ReadyFilter:
    """Connected and ready; where none is, those under repair, at which requests wait."""

    def keep(self, query: RoutingQuery, replicas: Sequence[ReplicaView]) -> Sequence[ReplicaView]:
        ready = [replica for replica in replicas if replica.is_ready]
        return ready or [replica for replica in replicas if replica.takes_requests]


class UntriedFilter:
    """Those that have not failed this request before."""

    def keep(self, query: RoutingQuery, replicas: Sequence[ReplicaView]) -> Sequence[ReplicaView]:
        return [replica for replica in replicas if replica.id not in query.tried]
