"""Bytes from a rank, made a message that is really of that rank."""

import msgspec

from engine.errors import ProtocolViolation
from engine.messages import FromRank, decode_from_rank


def decode_message(data: bytes, rank: int) -> FromRank:
    """Raises ProtocolViolation where it is no message, or another rank's."""
    try:
        message = decode_from_rank(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolViolation(f"rank {rank} sent what is no message: {error}") from error
    if message.rank != rank:
        raise ProtocolViolation(f"rank {rank} speaks for rank {message.rank}")
    return message
