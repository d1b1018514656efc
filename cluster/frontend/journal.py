"""What one stream has taken, and what is to be done when that which produced it is lost. Pure: the time, and what is
known of the replicas, are arguments.

A stream goes on without gap or repetition because the engine can begin a request behind tokens that were generated
before: sampling depends on (seed, choice, position) alone, penalties are recomputed from the tokens, and grammars are
advanced over them. So what is kept here is the tokens, and how many of the prompt's log-probabilities have come.
"""

import math
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from cluster.errors import ConnectionLost, Draining, Unavailable, UnknownStream
from cluster.router.replica_table import ReplicaView
from engine.errors import EngineFailure, Overloaded, ProtocolViolation, RemudaError, RequestFailure
from engine.request import FinishReason, Output, Request, TopLogprobs


@dataclass(frozen=True)
class FailoverPolicy:
    """Seconds, and how often.

    ``max_replays``: times that a request is computed again after something broke under it; one that breaks what it runs
    on does not go on for ever. ``wait_s``: for a replica to take it, each time. ``reattach_s``: for the connection to
    its leader to come back, while another replica could take it. ``pause_s``: before those that refused are asked
    again.
    """

    max_replays: int = 4
    wait_s: float = 90.0
    reattach_s: float = 3.0
    pause_s: float = 0.5


@dataclass(frozen=True)
class Submit:
    """Have ``request`` computed, by a replica that is not among ``tried``."""

    request: Request
    tried: frozenset[str]


@dataclass(frozen=True)
class Attach:
    """Ask ``replica`` for what it has of ``request_id`` from this position on."""

    replica: str
    request_id: str
    num_tokens: int
    num_prompt_logprobs: int


@dataclass(frozen=True)
class Wait:
    """Until something is new of the replicas, at most until ``until_s``."""

    until_s: float


@dataclass(frozen=True)
class Finish:
    """All of it was there; only the word that it was the end is lost."""

    output: Output


Action = Submit | Attach | Wait | Finish

_NOT_ITS_OWN = (Unavailable, Overloaded, EngineFailure, UnknownStream)
"""Errors of what computes a request. All others are the request's own: it would meet them again."""

_ATTEMPT = re.compile(r"~(\d+)$")


def attempt_of(request_id: str) -> int:
    """The number in a name that ``Journal`` gave; 0 for the first."""
    found = _ATTEMPT.search(request_id)
    return 0 if found is None else int(found.group(1))


def index_of(request_id: str) -> int:
    """Which sequence of its client's request this is."""
    return int(request_id.partition("~")[0].rpartition(".")[2])


@dataclass(frozen=True)
class _Place:
    """Where the request runs, or ran: a replica, in one life of its leader, under one name."""

    replica: str
    incarnation: int
    request_id: str


@dataclass(frozen=True)
class _Loss:
    error: RemudaError
    at_s: float
    """When the trouble began; what is tried and fails meanwhile does not begin it anew."""
    is_held: bool
    """The leader may still be computing it."""
    held_since_s: float


class Journal:
    """One sequence, from the first submission to its end.

    ``next_action`` says what to do; the caller then reports ``sent`` and every output (``take``) or the error that
    ended the stream (``lost``), and asks again.

    Args:
        request: as it was asked for.
        policy: bounds.
        held_by: (replica, incarnation, request id) of a leader that has it already, when a client comes back.
    """

    def __init__(
        self, request: Request, policy: FailoverPolicy = FailoverPolicy(), held_by: tuple[str, int, str] | None = None
    ) -> None:
        self._request = request
        self._policy = policy
        self._token_ids = array("I")
        self._num_prompt_logprobs = 0
        self._num_to_skip = 0
        """Entries of the prompt's log-probabilities that the present attempt repeats."""
        self._place: _Place | None = None if held_by is None else _Place(*held_by)
        self._is_attaching = held_by is not None
        self._loss: _Loss | None = None
        self._tried: frozenset[str] = frozenset()
        self._pause_until_s = 0.0
        self._has_begun = held_by is not None
        self._num_sent = 0 if held_by is None else attempt_of(held_by[2]) + 1
        self._has_taken = False
        """Anything of the present attempt."""
        self._num_replays = 0
        self._is_repairing = False
        self._waits_from_s = -math.inf
        """Its patience counts from there, or from its loss."""
        self._abandoned: list[tuple[str, str]] = []
        self.is_finished = False

    @property
    def request_id(self) -> str:
        return self._request.request_id

    @property
    def trace(self) -> str:
        """Whose attempts these are; empty where nobody traces them."""
        return self._request.trace

    @property
    def num_tokens(self) -> int:
        """Generated and taken."""
        return len(self._token_ids)

    @property
    def num_replays(self) -> int:
        return self._num_replays

    def take_abandoned(self) -> list[tuple[str, str]]:
        """(replica, request id) of what runs somewhere and is not waited for any more, each once."""
        abandoned, self._abandoned = self._abandoned, []
        return abandoned

    def next_action(self, now_s: float, replicas: Sequence[ReplicaView], is_repairing: bool = False) -> Action:
        """What to do now. Raises the error that lost the request, where there is nothing left to try.

        ``is_repairing``: a leader is being replaced, and whoever does it will say when that has ended, or failed: until
        then no time is too long, but for the request's own deadline. To be called when that changes.
        """
        if self._loss is None:
            return self._attach() if self._is_attaching else Submit(self._resumed(), frozenset())
        sampling = self._request.sampling
        if sampling.pooling is None and len(self._token_ids) >= sampling.max_tokens:
            self.is_finished = True
            return Finish(Output(self._request.request_id, [], FinishReason.LENGTH))
        if is_repairing or self._is_repairing:
            self._waits_from_s = now_s
        self._is_repairing = is_repairing
        until_s = max(self._loss.at_s, self._waits_from_s) + self._policy.wait_s
        if now_s >= until_s:
            raise self._given_up(f"no replica could go on with it within {self._policy.wait_s:g} s")
        if self._loss.is_held:
            action = self._reattachment(self._loss, now_s, replicas, until_s)
            if action is not None:
                return action
        self._leave()
        if self._num_replays > self._policy.max_replays:
            raise self._given_up(f"it was begun {self._num_replays} times")
        ready = {replica.id for replica in replicas if replica.takes_requests}
        if ready - self._tried:
            return Submit(self._resumed(), self._tried)
        if not self._has_begun and (self._tried or not ready):
            raise self._loss.error
        if not ready or now_s < self._pause_until_s:
            return Wait(min(until_s, self._pause_until_s) if ready else until_s)
        self._tried = frozenset()
        return Submit(self._resumed(), self._tried)

    def _attach(self) -> Attach:
        assert self._place is not None
        self._num_to_skip = 0
        return Attach(self._place.replica, self._place.request_id, self.num_tokens, self._num_prompt_logprobs)

    def _reattachment(
        self, loss: _Loss, now_s: float, replicas: Sequence[ReplicaView], until_s: float
    ) -> Attach | Wait | None:
        """To the same leader, or waiting for it, at most ``until_s``. None: it is gone, or others need not wait for it
        any longer."""
        assert self._place is not None
        place = self._place
        view = next((replica for replica in replicas if replica.id == place.replica), None)
        if view is None or view.info.incarnation != place.incarnation:
            return None
        if view.is_connected:
            return self._attach()
        others = any(replica.is_ready for replica in replicas)
        if not others:
            return Wait(until_s)
        reattach_until_s = loss.held_since_s + self._policy.reattach_s
        return Wait(reattach_until_s) if now_s < reattach_until_s else None

    def _resumed(self) -> Request:
        """The request as it goes on from here, under a name that no earlier attempt had."""
        request = self._request
        self._num_to_skip = self._num_prompt_logprobs
        if not self._num_sent and not self._has_begun:
            return request
        # The prompt's log-probabilities come again, though all are here: another front end may ask for them there.
        return msgspec.structs.replace(
            request,
            request_id=f"{request.request_id}~{self._num_sent}",
            token_ids=[*request.token_ids, *self._token_ids],
        )

    def sent(self, replica: str, incarnation: int, request_id: str) -> None:
        """A submission goes to this replica."""
        self._place = _Place(replica, incarnation, request_id)
        self._num_sent += 1
        self._has_taken = False
        self._is_attaching = False

    def take(self, output: Output) -> Output | None:
        """The output without what came before; None where nothing of it is new.

        Raises:
            Unavailable: the replica stopped the request by itself; ``lost`` follows.
            RequestFailure: the engine could not go on with it.
            ProtocolViolation: more than was asked for.
        """
        if output.finish_reason is FinishReason.ABORT:
            raise Unavailable("the replica stopped this request; try again")
        if output.finish_reason is FinishReason.ERROR:
            raise RequestFailure(output.error or "the engine could not go on with this request")
        if self.is_finished or len(self._token_ids) + len(output.token_ids) > self._request.sampling.max_tokens:
            raise ProtocolViolation(f"more came of request {self._request.request_id} than was asked for")
        self._has_begun = self._has_taken = True
        self._loss = None
        self._tried = frozenset()
        self._token_ids.extend(output.token_ids)
        if output.prompt_logprobs:
            output = self._without_repeated(output, output.prompt_logprobs)
        self.is_finished = output.finish_reason is not None
        is_empty = not (output.token_ids or output.prompt_logprobs or self.is_finished)
        return None if is_empty and self._num_sent > 1 else output

    def _without_repeated(self, output: Output, entries: list[TopLogprobs | None]) -> Output:
        num_old = min(self._num_to_skip, len(entries))
        self._num_to_skip -= num_old
        self._num_prompt_logprobs += len(entries) - num_old
        return msgspec.structs.replace(output, prompt_logprobs=entries[num_old:] or None) if num_old else output

    def lost(self, error: RemudaError, now_s: float) -> None:
        """The stream ended with ``error``. Raises it where it is the request's own, and trying again would not help."""
        if isinstance(error, RequestFailure) or not isinstance(error, _NOT_ITS_OWN):
            raise error
        if self._place is None and not self._has_begun:
            raise error  # nobody was there to take it
        if not isinstance(error, Overloaded | Draining | UnknownStream):
            self._has_begun = True
        elif not self._has_taken and not isinstance(error, UnknownStream):
            self._num_sent -= 1  # refused: nobody has anything under this name
        if isinstance(error, EngineFailure) or (self._has_taken and not isinstance(error, ConnectionLost)):
            self._num_replays += 1
        if isinstance(error, UnknownStream):
            self._place = None
        elif self._place is not None and not isinstance(error, ConnectionLost):
            self._tried |= {self._place.replica}
        is_held = isinstance(error, ConnectionLost) and self._place is not None
        began_s = now_s if self._loss is None else self._loss.at_s
        self._loss = _Loss(error, began_s, is_held, now_s)
        self._pause_until_s = now_s + self._policy.pause_s
        self._is_attaching = False

    def close(self) -> None:
        """Nobody waits for it any more."""
        self._leave()

    def _leave(self) -> None:
        """Whoever may still compute it for us need not."""
        if self._loss is not None and self._loss.is_held:
            assert self._place is not None
            self._abandoned.append((self._place.replica, self._place.request_id))
            self._tried |= {self._place.replica}
            self._num_replays += 1
            self._loss = _Loss(self._loss.error, self._loss.at_s, False, self._loss.held_since_s)
            self._place = None

    def _given_up(self, why: str) -> RemudaError:
        assert self._loss is not None
        error = self._loss.error
        return Unavailable(f"the request could not be finished: {why}; the last that happened: {error}")
