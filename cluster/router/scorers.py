"""How well each replica suits a request, from 0 to 1."""

from typing import Protocol

from cluster.router.query import RoutingQuery
from cluster.router.replica_table import ReplicaView


class Scorer(Protocol):
    def score(self, query: RoutingQuery, replica: ReplicaView) -> float:
        """0 (bad) to 1 (best)."""
        ...


class LeastLoadScorer:
    """1 for an idle replica; falls with the number of requests that run or wait there."""

    def score(self, query: RoutingQuery, replica: ReplicaView) -> float:
        return 1.0 / (1.0 + replica.load)
