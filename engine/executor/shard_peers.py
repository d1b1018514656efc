"""A newcomer takes from ranks that have their weights what they hold in common with it; see shard_server.

Nothing that goes wrong there is an error: what did not come is asked of the next rank, and in the end the loader reads
it from the checkpoint.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from engine.config import ParallelConfig
from engine.errors import ProtocolViolation
from engine.executor.handshake import greet_leader
from engine.executor.sealed_link import SealedLink, greeting_secret
from engine.executor.shard_server import (
    BLOCK_BYTES,
    MAX_LIST_BYTES,
    PURPOSE,
    WAIT_TIMEOUT_S,
    WANTED,
    block_label,
    held_label,
)
from engine.executor.sockets import connect
from engine.parallel.mesh import Mesh
from engine.parameter import TensorSlice
from engine.weights.shared_pieces import Piece, PieceKeys, blocks_of, destinations, fill_block

_log = logging.getLogger(__name__)

LEAST_BYTES_PER_S = 16 * 2**20
"""A rank that gives less, after WAIT_TIMEOUT_S in which it may give nothing, is left: a disk is as fast."""

_Missing = dict[bytes, list[Piece]]


class ShardPeers:
    """Args:
    rank: this one.
    addresses: of the shard servers, by rank; they are asked in this order.
    secret: the gang's, of this formation.
    """

    def __init__(self, rank: int, addresses: Mapping[int, str], secret: str, keys: PieceKeys) -> None:
        self._rank = rank
        self._addresses = addresses
        self._secret = secret
        self._keys = keys
        self.num_bytes = 0
        """That came so far."""

    def fill(self, pieces: Sequence[Piece]) -> Iterator[Piece]:
        """Fills what another rank holds; yields each piece that is whole. See engine.weights.loader."""
        missing: _Missing = {}
        for piece in pieces if self._addresses else ():
            if (key := self._keys.of(piece)) is not None:
                missing.setdefault(key, []).append(piece)
        for peer, address in self._addresses.items():
            if not missing:
                return
            try:
                yield from self._take(address, missing)
            except (OSError, ProtocolViolation, ValueError) as error:  # msgspec's errors are ValueErrors
                names = [_name_of(found[0]) for found in missing.values()]
                _log.warning(
                    "rank %d: rank %d at %s did not give all of its weights: %s; %r and %d more come from elsewhere",
                    *(self._rank, peer, address, error, names[0] if names else "", max(0, len(names) - 1)),
                )

    def _take(self, address: str, missing: _Missing) -> Iterator[Piece]:
        """What comes leaves ``missing``."""
        with connect(address, WAIT_TIMEOUT_S) as connection:
            greet_leader(connection, greeting_secret(self._secret, PURPOSE), [self._rank], WAIT_TIMEOUT_S)
            link = SealedLink(connection, self._secret, PURPOSE, WAIT_TIMEOUT_S)
            held = self._ask(link, list(missing))
            num_bytes = sum(missing[key][0].num_bytes for key in held)
            link.deadline_s = time.monotonic() + WAIT_TIMEOUT_S + num_bytes / LEAST_BYTES_PER_S
            for key in held:
                first, *others = missing[key]
                for number, block in enumerate(blocks_of(destinations(first), BLOCK_BYTES)):
                    fill_block(block, link.receive(block_label(key, number), block.nbytes))
                for other in others:
                    for source, target in zip(destinations(first), destinations(other), strict=True):
                        target.copy_(source)
                del missing[key]
                for piece in (first, *others):
                    self.num_bytes += piece.num_bytes
                    yield piece

    def _ask(self, link: SealedLink, wanted: list[bytes]) -> list[bytes]:
        """Those of ``wanted`` that the other side will give, in the order in which it does."""
        question = msgspec.msgpack.encode(wanted)
        link.send(WANTED, question, with_length=True)
        answer = link.receive_any(held_label(question), MAX_LIST_BYTES)
        held = msgspec.msgpack.decode(answer, type=list[int])
        if any(not 0 <= index < len(wanted) for index in held) or len(set(held)) != len(held):
            raise ProtocolViolation("it claims to hold what it was not asked for")
        return [wanted[index] for index in held]


def in_order_of_kinship(addresses: Mapping[int, str], rank: int, parallel: ParallelConfig) -> dict[int, str]:
    """First those that hold all that is not divided among experts, then those of this stage, and of each the next in
    number first: several newcomers begin with several of them."""
    own = Mesh(parallel, rank)

    def distance(other: int) -> tuple[bool, bool, int]:
        there = Mesh(parallel, other)
        return there.pp_rank != own.pp_rank, there.tp_rank != own.tp_rank, (other - rank) % parallel.num_ranks

    return {other: addresses[other] for other in sorted(addresses, key=distance) if other != rank}


def _name_of(piece: Piece) -> str:
    return piece.name if isinstance(piece, TensorSlice) else piece.sources[0].name
