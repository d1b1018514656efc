"""How well each replica suits a request, from 0 to 1."""

from typing import Protocol

from cluster.router.prefix_index import PrefixIndex
from cluster.router.query import RoutingQuery
from cluster.router.replica_table import ReplicaView

_FULL_AT = 0.25
"""The share of its slots in use at which an idle replica counts twice as much."""


class Scorer(Protocol):
    def score(self, query: RoutingQuery, replica: ReplicaView) -> float:
        """0 (bad) to 1 (best)."""
        ...


class LeastLoadScorer:
    """1 for an idle replica; falls with the number of requests that run or wait there, ½ at a quarter of its slots."""

    def score(self, query: RoutingQuery, replica: ReplicaView) -> float:
        return 1.0 / (1.0 + replica.load / (_FULL_AT * max(1, replica.info.max_num_seqs)))


class PrefixScorer:
    """The share of the prompt that the replica has most likely cached."""

    def __init__(self, index: PrefixIndex) -> None:
        self._index = index

    def score(self, query: RoutingQuery, replica: ReplicaView) -> float:
        block_size = replica.info.block_size
        if len(query.token_ids) < block_size:
            return 0.0
        num_cached = self._index.num_cached(replica.info, query.block_hashes(block_size))
        return num_cached * block_size / len(query.token_ids)
