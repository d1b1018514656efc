"""Names for the contents of KV blocks: equal prefixes have equal names, in every process and on every host.

A block's keys and values depend on all tokens before it as well, so its name is a hash over its parent's name and its
own tokens (as in vLLM's prefix caching). The chain begins with what else they depend on: the model's revision, an
adapter, a tenant's salt.
"""

from array import array
from collections.abc import Sequence
from hashlib import blake2b as _blake2b

_DIGEST_BYTES = 16


def root_hash(*parts: str) -> bytes:
    """The beginning of a chain; other parts give another chain."""
    digest = _blake2b(digest_size=_DIGEST_BYTES)
    for part in parts:
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.digest()


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The name of the block that holds ``token_ids`` and follows the block ``parent``."""
    return _blake2b(parent + array("I", token_ids).tobytes(), digest_size=_DIGEST_BYTES).digest()


def extend_hashes(hashes: list[bytes], root: bytes, token_ids: Sequence[int], num_blocks: int, block_size: int) -> None:
    """Appends to ``hashes`` until it names the first ``num_blocks`` blocks of ``token_ids``."""
    first = len(hashes) * block_size
    data = array("I", token_ids[first : num_blocks * block_size]).tobytes()
    num_bytes = array("I").itemsize * block_size
    parent = hashes[-1] if hashes else root
    for start in range(0, len(data), num_bytes):
        parent = _blake2b(parent + data[start : start + num_bytes], digest_size=_DIGEST_BYTES).digest()
        hashes.append(parent)
