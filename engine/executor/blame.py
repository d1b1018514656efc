"""Which rank to name when a gang breaks: the one that is gone, not those that noticed."""

import time

from engine.errors import RankFailure, RemudaError
from engine.executor.channel import ChannelClosed, LeaderChannel
from engine.executor.rank_message import decode_message
from engine.messages import RankError

_PATIENCE_S = 1.0
"""A rank that lost its neighbour reports it sooner than the neighbour's own end may reach the leader."""


def error_of(report: RankError) -> RemudaError:
    """The error that a rank raised, as the class it had there."""
    for error_class in _tree(RemudaError):
        if error_class.__name__ == report.kind and not issubclass(error_class, RankFailure):
            error = error_class(f"rank {report.rank}: {report.message}")
            error.add_note(report.detail)
            return error
    culprit = report.rank if report.culprit is None else report.culprit
    failure = RankFailure(f"rank {report.rank}: {report.message}", culprit)
    failure.add_note(report.detail)
    return failure


def find_culprit(channel: LeaderChannel, report: RankError, num_ranks: int) -> RemudaError:
    """``report`` came first. Where it only says that another rank was lost, looks for that one for a moment."""
    first = error_of(report)
    if not isinstance(first, RankFailure) or num_ranks == 1:
        return first
    witnesses = {report.rank}
    deadline = time.monotonic() + _PATIENCE_S
    while (left := deadline - time.monotonic()) > 0 and len(witnesses) < num_ranks:
        try:
            rank, data = channel.receive(left)
        except TimeoutError:
            break
        except ChannelClosed:
            return first
        except RankFailure as loss:
            if loss.rank not in witnesses:
                return loss
            continue
        message = decode_message(data, rank)
        if isinstance(message, RankError):
            other = error_of(message)
            if not isinstance(other, RankFailure):
                return other
            witnesses.add(rank)
    silent = sorted(set(range(num_ranks)) - witnesses)
    if len(silent) == 1:
        return RankFailure(f"rank {silent[0]} does not answer; {first}", silent[0])
    return first


def _tree(root: type[RemudaError]) -> list[type[RemudaError]]:
    found = [root]
    for child in root.__subclasses__():
        found += _tree(child)
    return found
