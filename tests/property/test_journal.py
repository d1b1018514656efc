"""Whatever breaks, and when: a stream's reader gets each token once and in order, and one end."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ConnectionLost, DeadlineExceeded, Draining, ModelNotFound, Unavailable, UnknownStream
from cluster.frontend.journal import (
    Attach,
    FailoverPolicy,
    Finish,
    Journal,
    Submit,
    Wait,
    attempt_of,
    index_of,
)
from cluster.router.replica_table import ReplicaView
from cluster.types import ReplicaInfo, ReplicaState
from engine.errors import (
    ContextLengthExceeded,
    EngineFailure,
    InvalidRequest,
    Overloaded,
    RankFailure,
    RemudaError,
    RequestFailure,
)
from engine.request import FinishReason, Output, Request, SamplingParams, TopLogprobs

POLICY = FailoverPolicy(max_replays=3, wait_s=20.0, reattach_s=2.0, pause_s=0.5)
PROMPT = [1, 2, 3, 4]


def view(
    name: str, incarnation: int = 1, state: ReplicaState = ReplicaState.READY, connected: bool = True
) -> ReplicaView:
    return ReplicaView(ReplicaInfo(name, "m", state, "", incarnation, 100, 4, 16, 10), connected)


def logprob(index: int) -> TopLogprobs:
    return TopLogprobs(-float(index), 1, [index], [-float(index)])


def whole(num_tokens: int) -> list[int]:
    return [1000 + index for index in range(num_tokens)]


@dataclass
class World:
    """Replicas that compute the right tokens until ``random`` breaks something."""

    random: Random
    num_replicas: int
    request: Request
    stops_at: int
    now_s: float = 0.0
    held: dict[tuple[str, int, str], int] = field(default_factory=dict)
    """Tokens that a leader's life has of a request."""
    views: list[ReplicaView] = field(default_factory=list)
    errors: int = 0

    def __post_init__(self) -> None:
        self.views = [view(f"r{index}") for index in range(self.num_replicas)]

    def shake(self) -> None:
        """Time passes, replicas come and go."""
        self.now_s += self.random.choice([0.0, 0.1, 1.0])
        for index, old in enumerate(self.views):
            kind = self.random.random()
            if kind < 0.1:
                self.views[index] = view(old.id, old.info.incarnation, old.info.state, connected=False)
            elif kind < 0.2:
                self.views[index] = view(old.id, old.info.incarnation + 1)
            elif kind < 0.3:
                self.views[index] = view(old.id, old.info.incarnation, ReplicaState.DRAINING)
            elif kind < 0.7:
                self.views[index] = view(old.id, old.info.incarnation)

    def submit(self, action: Submit, journal: Journal) -> Iterator[Output]:
        ready = [each for each in self.views if each.is_ready and each.id not in action.tried]
        if not ready:
            raise Unavailable("nobody")
        replica = self.random.choice(ready)
        asked = action.request
        key = (replica.id, replica.info.incarnation, asked.request_id)
        assert key not in self.held, "a name is used once"
        journal.sent(*key)
        if self.random.random() < 0.2:
            raise self.random.choice([Overloaded("full"), Draining("draining"), Unavailable("starting")])
        assert asked.token_ids[: asked.num_prompt_tokens] == PROMPT
        start = len(asked.token_ids) - len(PROMPT)
        assert asked.token_ids[len(PROMPT) :] == whole(start)
        assert start < self.request.sampling.max_tokens, "there is something left to compute"
        self.held[key] = start
        wants_prompt = asked.sampling.prompt_logprobs is not None
        yield from self._run(key, start, 0 if wants_prompt else len(PROMPT))

    def attach(self, action: Attach) -> Iterator[Output]:
        (replica,) = [each for each in self.views if each.id == action.replica]
        key = (replica.id, replica.info.incarnation, action.request_id)
        if self.held.get(key, -1) < action.num_tokens or self.random.random() < 0.2:
            raise UnknownStream("gone")
        yield from self._run(key, action.num_tokens, action.num_prompt_logprobs)

    def _run(self, key: tuple[str, int, str], at: int, prompt_at: int) -> Iterator[Output]:
        if self.request.sampling.prompt_logprobs is None:
            prompt_at = len(PROMPT)
        while True:
            if self.random.random() < 0.25:
                self.errors += 1
                raise self.random.choice(
                    [ConnectionLost("cut"), ConnectionLost("cut"), RankFailure("died"), Unavailable("stopped")]
                )
            if prompt_at < len(PROMPT):
                count = self.random.randint(1, len(PROMPT) - prompt_at)
                entries = [None if at_ == 0 else logprob(at_) for at_ in range(prompt_at, prompt_at + count)]
                prompt_at += count
                yield Output("", [], prompt_logprobs=entries)
                continue
            end = min(at + self.random.randint(1, 3), self.stops_at)
            self.held[key] = end
            reason = None
            if end == self.stops_at:
                is_limit = end == self.request.sampling.max_tokens
                reason = FinishReason.LENGTH if is_limit else FinishReason.STOP
                if is_limit and self.random.random() < 0.3:
                    yield Output("", whole(end)[at:], logprobs=[logprob(index) for index in range(at, end)])
                    raise ConnectionLost("cut before the word that it was the end")
            yield Output("", whole(end)[at:], reason, logprobs=[logprob(index) for index in range(at, end)])
            at = end
            if reason is not None:
                return


def drive(world: World, journal: Journal) -> list[Output]:
    """What cluster.frontend.fleet does, without waiting."""
    found: list[Output] = []
    while not journal.is_finished:
        action = journal.next_action(world.now_s, world.views)
        if isinstance(action, Finish):
            found.append(action.output)
            break
        if isinstance(action, Wait):
            assert action.until_s > world.now_s
            world.now_s = min(action.until_s, world.now_s + 0.3)
            world.shake()
            continue
        try:
            for output in world.submit(action, journal) if isinstance(action, Submit) else world.attach(action):
                if (news := journal.take(output)) is not None:
                    found.append(news)
        except RemudaError as error:
            journal.lost(error, world.now_s)
        world.shake()
    return found


@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(1, 12), st.booleans(), st.booleans())
def test_each_token_once_and_in_order(
    seed: int, num_replicas: int, max_tokens: int, stops_early: bool, wants_prompt: bool
) -> None:
    random = Random(seed)
    stops_at = random.randint(1, max_tokens) if stops_early else max_tokens
    sampling = SamplingParams(max_tokens=max_tokens, logprobs=1, prompt_logprobs=1 if wants_prompt else None)
    request = Request("a.0", PROMPT, len(PROMPT), sampling)
    journal = Journal(request, POLICY)
    world = World(random, num_replicas, request, stops_at)
    taken: list[Output] = []
    take = journal.take
    journal.take = lambda output: _noted(take(output), taken)  # type: ignore[method-assign]
    try:
        drive(world, journal)
        is_whole = True
    except (Unavailable, Overloaded, EngineFailure, UnknownStream):
        is_whole = False
    tokens = [token for output in taken for token in output.token_ids]
    assert tokens == whole(len(tokens))
    assert [entry for output in taken for entry in output.logprobs or ()] == list(map(logprob, range(len(tokens))))
    prompt = [entry for output in taken for entry in output.prompt_logprobs or ()]
    assert prompt == [None, *map(logprob, range(1, len(PROMPT)))][: len(prompt)]
    if is_whole:
        assert len(tokens) == stops_at
        assert len(prompt) == (len(PROMPT) if wants_prompt else 0)
    else:
        assert world.errors or world.now_s > 0 or not taken
    assert journal.num_replays <= POLICY.max_replays + 1


def _noted(output: Output | None, taken: list[Output]) -> Output | None:
    if output is not None:
        taken.append(output)
    return output


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("no", "top_k"),
        ContextLengthExceeded("too long"),
        RequestFailure("the grammar leads nowhere"),
        DeadlineExceeded("late"),
        ModelNotFound("who"),
    ],
)
def test_a_request_s_own_error_is_never_replayed(error: RemudaError) -> None:
    journal = Journal(Request("a.0", PROMPT, 4, SamplingParams(max_tokens=5)), POLICY)
    assert isinstance(journal.next_action(0.0, [view("r0"), view("r1")]), Submit)
    journal.sent("r0", 1, "a.0")
    journal.take(Output("", whole(2)))
    with pytest.raises(type(error)):
        journal.lost(error, 1.0)


def test_a_leader_that_comes_back_is_asked_first_and_left_after_a_while() -> None:
    journal = Journal(Request("a.0", PROMPT, 4, SamplingParams(max_tokens=5)), POLICY)
    journal.next_action(0.0, [view("r0"), view("r1")])
    journal.sent("r0", 1, "a.0")
    journal.take(Output("", whole(2)))
    journal.lost(ConnectionLost("cut"), 10.0)
    cut = [view("r0", connected=False), view("r1")]
    assert journal.next_action(10.0, cut) == Wait(12.0)
    assert journal.next_action(11.0, [view("r0"), view("r1")]) == Attach("r0", "a.0", 2, 0)
    assert journal.take_abandoned() == []
    journal.lost(ConnectionLost("cut again"), 11.5)
    action = journal.next_action(13.6, cut)
    assert isinstance(action, Submit) and action.tried == {"r0"} and action.request.token_ids == PROMPT + whole(2)
    assert journal.take_abandoned() == [("r0", "a.0")]


@pytest.mark.parametrize("error", [ConnectionLost("cut"), RankFailure("died")])
def test_time_does_not_count_while_a_leader_is_being_replaced(error: RemudaError) -> None:
    journal = Journal(Request("a.0", PROMPT, 4, SamplingParams(max_tokens=5)), POLICY)
    journal.next_action(0.0, [view("r0")])
    journal.sent("r0", 1, "a.0")
    journal.take(Output("", whole(2)))
    journal.lost(error, 10.0)
    gone = [view("r0", connected=False)]
    assert journal.next_action(10.0, gone) == Wait(30.0)
    for now_s in (11.0, 500.0, 900.0):
        assert journal.next_action(now_s, gone, is_repairing=True) == Wait(now_s + POLICY.wait_s)
    assert journal.next_action(1000.0, gone) == Wait(1000.0 + POLICY.wait_s), "from the end of the repair on"
    assert journal.next_action(1010.0, gone) == Wait(1000.0 + POLICY.wait_s)
    with pytest.raises(Unavailable, match="within 20 s"):
        journal.next_action(1020.0, gone)


def test_another_life_of_the_leader_is_not_asked() -> None:
    journal = Journal(Request("a.0", PROMPT, 4, SamplingParams(max_tokens=5)), POLICY)
    journal.sent("r0", 1, "a.0")
    journal.lost(ConnectionLost("cut"), 10.0)
    action = journal.next_action(10.1, [view("r0", incarnation=2)])
    assert isinstance(action, Wait)
    assert isinstance(journal.next_action(10.6, [view("r0", incarnation=2)]), Submit)


def test_what_goes_on_elsewhere_brings_the_prompt_s_log_probabilities_for_other_front_ends() -> None:
    sampling = SamplingParams(max_tokens=5, prompt_logprobs=1)
    journal = Journal(Request("a.0", PROMPT, 4, sampling), POLICY)
    journal.next_action(0.0, [view("r0"), view("r1")])
    journal.sent("r0", 1, "a.0")
    entries = [None, *map(logprob, range(1, len(PROMPT)))]
    journal.take(Output("", whole(2), prompt_logprobs=entries))
    journal.lost(RankFailure("died"), 1.0)
    action = journal.next_action(1.0, [view("r0"), view("r1")])
    assert isinstance(action, Submit) and action.request.sampling == sampling
    journal.sent("r1", 1, action.request.request_id)
    assert journal.take(Output("", [], prompt_logprobs=list(entries))) is None
    assert journal.take(Output("", whole(3)[2:])) == Output("", whole(3)[2:])


def test_a_request_that_nobody_has_any_more_waits_for_a_replica_that_takes_it() -> None:
    journal = Journal(Request("a.0", PROMPT, 4, SamplingParams(max_tokens=5)), POLICY)
    journal.sent("r0", 1, "a.0")
    journal.take(Output("", whole(2)))
    journal.lost(UnknownStream("forgotten"), 10.0)
    assert isinstance(journal.next_action(11.0, [view("r0")]), Submit)
    journal.lost(Unavailable("no replica can take the request now"), 11.0)  # before it was sent anywhere
    action = journal.next_action(12.0, [view("r0")])
    assert isinstance(action, Submit) and action.tried == frozenset()
    assert action.request.request_id == "a.0~1" and action.request.token_ids == PROMPT + whole(2)


@pytest.mark.parametrize(("name", "attempt", "index"), [("c.0", 0, 0), ("c.1~2", 2, 1), ("c.12.3~10", 10, 3)])
def test_names_tell_sequence_and_attempt(name: str, attempt: int, index: int) -> None:
    assert (attempt_of(name), index_of(name)) == (attempt, index)


def test_what_the_engine_could_not_go_on_with_is_said_in_its_words() -> None:
    journal = Journal(Request("a.0", PROMPT, 4, SamplingParams(max_tokens=5)), POLICY)
    journal.sent("r0", 1, "a.0")
    with pytest.raises(RequestFailure, match="it broke the gang three times"):
        journal.take(Output("a.0", [], FinishReason.ERROR, error="it broke the gang three times"))


def test_lost_connections_are_no_replays() -> None:
    journal = Journal(Request("a.0", PROMPT, 4, SamplingParams(max_tokens=5)), POLICY)
    journal.sent("r0", 1, "a.0")
    journal.take(Output("", whole(2)))
    for attempt in range(POLICY.max_replays + 2):
        now_s = 10.0 + 0.1 * attempt
        journal.lost(ConnectionLost("cut"), now_s)
        assert journal.next_action(now_s + 0.05, [view("r0"), view("r1")]) == Attach("r0", "a.0", 2, 0)
    journal.lost(ConnectionLost("cut for good"), 10.9)
    action = journal.next_action(13.6, [view("r0", connected=False), view("r1")])
    assert isinstance(action, Submit) and action.tried == {"r0"}
