"""What a supervisor asks of its leader besides events: how busy the gang is."""

from typing import Self

import msgspec

from cluster.types import ReplicaState


class LeaderLoad(msgspec.Struct, frozen=True):
    """At most one step old."""

    state: ReplicaState
    num_running: int
    num_waiting: int
    max_num_seqs: int

    @property
    def has_drained(self) -> bool:
        """Nothing runs any more, and nothing will."""
        return self.state is ReplicaState.DRAINING and self.num_running + self.num_waiting == 0

    def encode(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        return msgspec.json.decode(data, type=cls)
