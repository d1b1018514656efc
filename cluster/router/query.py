"""What routing may know of a request."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.block_hash import extend_hashes, root_hash

MAX_HASHED_BLOCKS = 2048
"""Of a prompt; where the beginnings of two agree for so long, what follows hardly changes which replica is better."""


@dataclass(frozen=True)
class RoutingQuery:
    """``tried``: replicas that could not take this request; they are not asked again. Requests with different adapters
    or cache salts share no cached blocks."""

    token_ids: Sequence[int] = ()
    tried: frozenset[str] = frozenset()
    adapter: str = ""
    cache_salt: str = ""
    _hashes: dict[int, list[bytes]] = field(default_factory=dict, repr=False, compare=False)

    def block_hashes(self, block_size: int) -> list[bytes]:
        """Names of the prompt's full blocks; hashed once per block size. Equal among this front end's queries only: the
        model's identity, which leaders put in, is the same for all replicas."""
        if block_size not in self._hashes:
            hashes: list[bytes] = []
            num_blocks = min(len(self.token_ids) // block_size, MAX_HASHED_BLOCKS)
            root = root_hash(self.adapter, self.cache_salt)
            extend_hashes(hashes, root, self.token_ids, num_blocks, block_size)
            self._hashes[block_size] = hashes
        return self._hashes[block_size]
