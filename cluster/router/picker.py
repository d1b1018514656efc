"""Which of the scored replicas gets the request."""

from collections.abc import Mapping
from typing import Protocol


class Picker(Protocol):
    def pick(self, scores: Mapping[str, float]) -> str:
        """One of the replica ids. ``scores`` is not empty."""
        ...


class BestInTurnPicker:
    """The best score; those that share it take turns, in the order of their ids."""

    def __init__(self) -> None:
        self._last = ""

    def pick(self, scores: Mapping[str, float]) -> str:
        best = max(scores.values())
        tied = sorted(replica_id for replica_id, score in scores.items() if score == best)
        self._last = next((replica_id for replica_id in tied if replica_id > self._last), tied[0])
        return self._last
