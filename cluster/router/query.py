"""What routing may know of a request."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class RoutingQuery:
    """``tried``: replicas that could not take this request; they are not asked again."""

    token_ids: Sequence[int] = ()
    tried: frozenset[str] = frozenset()
