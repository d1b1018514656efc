"""What must hold at the end of every run."""

import functools
import json
from collections.abc import Sequence

from cluster.errors import Draining, Unavailable, UnknownStream
from cluster.frontend.tools.parser import ToolCallParser
from cluster.simulate.faults import Scenario
from cluster.simulate.gang import logprobs_at, sequential_tokens
from cluster.simulate.record import Record, add_to
from cluster.simulate.replica import SimulatedReplica
from cluster.simulate.vocabulary import STRUCTURES, VOCAB_SIZE, allowed_behind, text_of
from engine.errors import RankFailure, RemudaError, RequestFailure
from engine.request import Request

_LOSSES = (Unavailable, RankFailure)
"""Errors of processes that are gone. A deadly request whose replays other faults have used up ends with one."""


def check(scenario: Scenario, records: Sequence[Record], replicas: Sequence[SimulatedReplica]) -> None:
    """Raises AssertionError."""
    for record in records:
        _check_record(scenario, record, replicas)
    for replica in replicas:
        _check_replica(replica)


def _check_replica(replica: SimulatedReplica) -> None:
    """It serves, and nothing is left over."""
    assert not replica.has_given_up, f"{replica.name} has given up: {replica.recovery.reason}"
    engine, server = replica.leader.engine, replica.leader.server
    assert engine is not None and server is not None, f"{replica.name} did not come back"
    stats = engine.stats()
    assert not (stats.num_blocks_used or stats.num_running or stats.num_waiting), f"{replica.name}: {stats}"
    engine.check_integrity()
    assert not server.num_live_requests, f"{replica.name} keeps requests"


def _check_record(scenario: Scenario, record: Record, replicas: Sequence[SimulatedReplica]) -> None:
    assert record.has_ended, f"{record.name} has no end"
    for index, request in enumerate(record.requests):
        _check_choice(record, index, request)
    if record.error is None:
        assert not _is_deadly(record, 1), f"{record.name} ended well, which it could not"
        assert sorted(end.choice for end in record.finished) == list(range(len(record.requests)))
        assert [usage.num_prompt_tokens for usage in record.usages] == [record.requests[0].num_prompt_tokens]
        num_tokens = sum(map(len, record.token_ids))
        assert record.usages[0].num_completion_tokens == num_tokens, f"{record.name}: {record.usages[0]}"
        return
    assert record.usages == [], f"{record.name} was counted, and failed: {record.usages}"
    if not _is_deadly(record, scenario.depth):
        assert _may_be_lost(record, record.error, replicas), f"{record.name} was lost: {record.error!r}"
    elif not isinstance(record.error, RequestFailure):
        assert scenario.faults, f"{record.name}: {record.error!r}"
        is_loss = isinstance(record.error, _LOSSES) or _may_be_lost(record, record.error, replicas)
        assert is_loss, f"{record.name}, which breaks what it runs on, ended as another one: {record.error!r}"


def _is_deadly(record: Record, depth: int) -> bool:
    """Whether one of its choices comes to the position that kills a rank. A plan computes the last token only where it
    was in flight, among ``depth``, before it was known as the last."""
    place = record.poison_at
    if place is None:
        return False
    return any(place < request.num_prompt_tokens + len(_expected(request)) + depth - 2 for request in record.requests)


def _expected(request: Request) -> list[int]:
    """Its tokens in a run without faults."""
    sampling = request.sampling
    allowed = None
    if sampling.grammar is not None:
        allowed = functools.partial(allowed_behind, sampling.grammar, ends=sampling.stop_token_ids)
    return sequential_tokens(sampling, request.token_ids, request.num_prompt_tokens, VOCAB_SIZE, allowed)


def _check_choice(record: Record, index: int, request: Request) -> None:
    name, token_ids, prompt = request.request_id, record.token_ids[index], request.token_ids
    expected = _expected(request)
    stop = next((place for place, char in enumerate(text_of(expected)) if char in record.stops), None)
    if stop is not None:
        expected = expected[: stop + 1]
    assert token_ids == expected[: len(token_ids)], f"{name}: other tokens than without faults"
    history = [*prompt, *token_ids]
    if request.sampling.logprobs is not None:
        due = [logprobs_at(history, position) for position in range(len(prompt), len(history))]
        assert record.logprobs[index] == due, f"{name}: log-probabilities are missing or came twice"
    if record.error is not None:
        return
    assert token_ids == expected, f"{name}: its end is missing"
    shown = expected if stop is None else expected[:stop]
    is_ended = stop is None and bool(shown) and shown[-1] in request.sampling.stop_token_ids
    if is_ended:
        shown = shown[:-1]  # an end token is not text
    _check_text(record, index, request, text_of(shown), is_complete=is_ended)
    if request.sampling.prompt_logprobs is not None:
        due_of_prompt = [None, *(logprobs_at(prompt, position) for position in range(1, len(prompt)))]
        assert list(record.echoes[index].logprobs or ()) == due_of_prompt, f"{name}: its prompt's are others"


def _check_text(record: Record, index: int, request: Request, text: str, *, is_complete: bool) -> None:
    """``text``: all that is due. ``is_complete``: it has come to its own end."""
    name, calls, shown = request.request_id, record.calls[index], text
    if record.tool:
        parser, due_calls, shown = ToolCallParser([record.tool]), list[list[str]](), ""
        for piece in [*parser.feed(text), *parser.finish()]:
            if isinstance(piece, str):
                shown += piece
            else:
                add_to(due_calls, piece)
        assert calls == due_calls, f"{name}: other tool calls"
    assert record.text[index] == shown, f"{name}: another text"
    structure = next((each for each in STRUCTURES if each.grammar == request.sampling.grammar), None)
    if structure is None or not is_complete:
        return
    assert structure.is_followed(text), f"{name}: {text!r} does not follow its grammar"
    if record.tool:
        ((tool, arguments),) = calls
        assert (tool, list(json.loads(arguments))) == (record.tool, ["a"]) and not shown


def _may_be_lost(record: Record, error: RemudaError, replicas: Sequence[SimulatedReplica]) -> bool:
    """What arrives where nobody serves is refused at once. And whoever lost front end and leader together has nobody
    left who knows of the request: that is more than a single fault."""
    if isinstance(error, UnknownStream):
        return record.num_cuts > 0 and any(replica.recovery.leader_life for replica in replicas)
    is_refused = isinstance(error, Draining) or (isinstance(error, Unavailable) and record.had_no_replica)
    return is_refused and not any(record.token_ids)
