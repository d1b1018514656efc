"""Chooses the replica of a request: filter → score → pick."""

from collections.abc import Sequence

from cluster.errors import Unavailable
from cluster.router.filters import Filter, ReadyFilter, UntriedFilter
from cluster.router.picker import BestInTurnPicker, Picker
from cluster.router.prefix_index import PrefixIndex
from cluster.router.query import RoutingQuery
from cluster.router.replica_table import ReplicaTable, ReplicaView
from cluster.router.scorers import LeastLoadScorer, PrefixScorer, Scorer

PREFIX_WEIGHT = 0.5
"""Of a wholly cached prompt, beside 1 for an idle replica: it is worth waiting beside other requests for, until a
quarter of the slots are in use; then another replica computes, and so caches, the same beginning."""


class NoReplica(Unavailable):
    """No replica may take the request."""


class Router:
    """Pure but for the picker's memory of its last choice, and the table's and the index's of what was sent.

    Args:
        table: the replicas.
        filters: each narrows down what the one before it left.
        scorers: (scorer, weight) pairs; a replica's score is the weighted sum.
        picker: chooses by score.
        prefixes: learns what went where.
    """

    def __init__(
        self,
        table: ReplicaTable,
        filters: Sequence[Filter],
        scorers: Sequence[tuple[Scorer, float]],
        picker: Picker,
        prefixes: PrefixIndex,
    ) -> None:
        self._table = table
        self._filters = filters
        self._scorers = scorers
        self._picker = picker
        self._prefixes = prefixes

    def route(self, query: RoutingQuery) -> str:
        """The id of the replica that is to take the request; table and index count it as sent there.

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
        info = next(replica.info for replica in replicas if replica.id == chosen)
        self._prefixes.note_sent(info, query.block_hashes(info.block_size))
        return chosen

    def _score(self, query: RoutingQuery, replica: ReplicaView) -> float:
        return sum(weight * scorer.score(query, replica) for scorer, weight in self._scorers)


def default_router(table: ReplicaTable) -> Router:
    """Ready replicas that did not fail the request before; the one with little to do that has much of the prompt in its
    cache; equals in turn."""
    prefixes = PrefixIndex()
    scorers: list[tuple[Scorer, float]] = [(LeastLoadScorer(), 1.0), (PrefixScorer(prefixes), PREFIX_WEIGHT)]
    return Router(table, [UntriedFilter(), ReadyFilter()], scorers, BestInTurnPicker(), prefixes)


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
    if not replica.takes_requests:
        return f"is {replica.info.state}"
    return "failed this request" if replica.id in query.tried else "was filtered out"
