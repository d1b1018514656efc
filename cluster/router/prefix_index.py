"""Which replica has most likely cached which beginnings of prompts: what this front end sent where, most recently used
first, as many blocks as the replica has.

An estimate from the routing itself, as in SGLang's router: no leader has to report each block. Other front ends'
requests, generated tokens and blocks that a replica gave up early are unknown to it; a wrong guess costs a prefill, no
more.
"""

from collections import OrderedDict
from collections.abc import Sequence

from cluster.types import ReplicaInfo


class PrefixIndex:
    """Names of blocks (engine.block_hash) by replica, as long as its leader lives: another incarnation begins empty."""

    def __init__(self) -> None:
        self._blocks: dict[str, tuple[int, OrderedDict[bytes, None]]] = {}

    def num_cached(self, replica: ReplicaInfo, hashes: Sequence[bytes]) -> int:
        """How many of the first ``hashes`` the replica has, without a gap."""
        incarnation, blocks = self._blocks.get(replica.id, (0, None))
        if not blocks or incarnation != replica.incarnation:
            return 0
        return next((index for index, name in enumerate(hashes) if name not in blocks), len(hashes))

    def note_sent(self, replica: ReplicaInfo, hashes: Sequence[bytes]) -> None:
        """A prompt of these blocks went there."""
        incarnation, blocks = self._blocks.get(replica.id, (0, None))
        if blocks is None or incarnation != replica.incarnation:
            blocks = OrderedDict()
            self._blocks[replica.id] = (replica.incarnation, blocks)
        # The beginning of a chain is used last: what is dropped first is its end, without which the rest still counts.
        for name in reversed(hashes):
            blocks[name] = None
            blocks.move_to_end(name)
        while len(blocks) > replica.num_blocks:
            blocks.popitem(last=False)
