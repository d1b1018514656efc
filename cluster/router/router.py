"""Chooses the replica of a request: filter → score → pick."""

from collections.abc import Sequence

from cluster.errors import Unavailable
from cluster.router.filters import Filter, ReadyFilter, UntriedFilter
from cluster.router.picker import BestInTurnPicker, Picker
from cluster.router.query import RoutingQuery
from cluster.router.replica_table import ReplicaTable, ReplicaView
from cluster.router.scorers import LeastLoadScorer, Scorer


class NoReplica(Unavailable):
    """No replica may take the request."""


class Router:
    """Pure but for the picker's memory of its last choice and the table's count of what was sent.

    Args:
        table: the replicas.
        filters: each narrows down what the one before it left.
        scorers: (scorer, weight) pairs; a replica's score is the weighted sum.
        picker: chooses by score.
    """

    def __init__(
        self, table: ReplicaTable, filters: Sequence[Filter], scorers: Sequence[tuple[Scorer, float]], picker: Picker
    ) -> None:
        self._table = table
        self._filters = filters
        self._scorers = scorers
        self._picker = picker

    def route(self, query: RoutingQuery) -> str:
        """The id of the replica that is to take the request; the table counts it as sent there.

        Raises:
            NoReplica: none may. The message says how many there are and what keeps them out.
        """
        replicas = self._table.views()
        for narrow in self._filters:
            replicas = narrow.keep(query, replicas)
        if not replicas:
            raise NoReplica(_why_none(self._table.views(), query))
        chosen = self._picker.pick({replica.id: self._score(query, replica) for replica in replicas})
        self._table.note_sent(chosen)
        return chosen

    def _score(self, query: RoutingQuery, replica: ReplicaView) -> float:
        return sum(weight * scorer.score(query, replica) for scorer, weight in self._scorers)


def least_load_router(table: ReplicaTable) -> Router:
    """Ready replicas that did not fail the request before; the one with least to do; equals in turn."""
    return Router(table, [ReadyFilter(), UntriedFilter()], [(LeastLoadScorer(), 1.0)], BestInTurnPicker())


def _why_none(replicas: Sequence[ReplicaView], query: RoutingQuery) -> str:
    if not replicas:
        return "no replica has started yet; try again shortly"
    states = ", ".join(
        f"{replica.id} {_condition(replica, query)}" for replica in sorted(replicas, key=lambda replica: replica.id)
    )
    return f"no replica can take the request now ({states}); try again shortly"


def _condition(replica: ReplicaView, query: RoutingQuery) -> str:
    if not replica.is_connected:
        return "is not connected"
    if not replica.is_ready:
        return f"is {replica.info.state}"
    return "failed this request" if replica.id in query.tried else "was filtered out"
