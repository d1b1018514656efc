"""Names for the contents of KV blocks: equal prefixes have equal names, in every process and on every host.

A block's keys and values depend on all tokens before it as well, so its name is a hash over its parent's name and its
own tokens (as in vLLM's prefix caching). The chain begins with what else they depend on: the model's revision, an
adapter, a tenant's salt.
"""

import hashlib
from array import array
from collections.abc import Sequence

_DIGEST_BYTES = 16


def root_hash(*parts: str) -> bytes:
    """The beginning of a chain; other parts give another chain."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for part in parts:
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.digest()


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The name of the block that holds ``token_ids`` and follows the block ``parent``."""
    return hashlib.blake2b(parent + array("I", token_ids).tobytes(), digest_size=_DIGEST_BYTES).digest()


def extend_hashes(hashes: list[bytes], root: bytes, token_ids: Sequence[int], num_blocks: int, block_size: int) -> None:
    """Appends to ``hashes`` until it names the first ``num_blocks`` blocks of ``token_ids``."""
    for index in range(len(hashes), num_blocks):
        parent = hashes[-1] if hashes else root
        hashes.append(block_hash(parent, token_ids[index * block_size : (index + 1) * block_size]))
