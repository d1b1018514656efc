"""A front end of the simulation: the real router, journal, clients of leaders and live requests."""

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import msgspec

from cluster.errors import Unavailable
from cluster.frontend.calls import Delta, Echo, Event, Finished, TimeLimits, Usage
from cluster.frontend.choice import Choice, EchoedPrompt
from cluster.frontend.clock import LoopClock, Timer
from cluster.frontend.cursor import Cursor, Remainder
from cluster.frontend.detokenizer import Detokenizer
from cluster.frontend.fleet import Fleet
from cluster.frontend.journal import Attach, Journal, Submit
from cluster.frontend.live_request import LiveRequest
from cluster.frontend.metrics import Metrics
from cluster.frontend.run import Run
from cluster.frontend.stop_strings import StopStrings
from cluster.frontend.stored_call import Holder, StoredCall
from cluster.frontend.token_bytes import TokenBytes
from cluster.replica.client import ReplicaClient
from cluster.replica.keep import Keep
from cluster.simulate.calls import SimulatedStub
from cluster.simulate.leader import VOCAB_SIZE
from cluster.simulate.network import Network
from cluster.simulate.process import Process
from cluster.simulate.replica import SimulatedReplica
from engine.errors import RemudaError
from engine.request import Output, Request, TopLogprobs

_TEXT = {token: chr(0x21 + token % 90) for token in range(VOCAB_SIZE)}
_TABLE = TokenBytes(_TEXT, frozenset(), {"type": "ByteLevel"})


def text_of(token_ids: Sequence[int]) -> str:
    """Each token is one character."""
    return "".join(map(_TEXT.__getitem__, token_ids))


MAX_TRIES = 20


class Record:
    """What one client asked for, and what it got.

    Args:
        name: the request's.
        requests: one per choice.
    stops: strings that end it.
    """

    def __init__(self, name: str, requests: list[Request], stops: tuple[str, ...] = ()) -> None:
        self.name = name
        self.requests = requests
        self.stops = stops
        self.logprobs: list[list[TopLogprobs]] = [[] for _ in requests]
        self.echoes: dict[int, Echo] = {}
        """The prompt with its log-probabilities, by choice."""
        self.usages: list[Usage] = []
        self.token_ids: list[list[int]] = [[] for _ in requests]
        self.text = ["" for _ in requests]
        self.finished: list[Finished] = []
        self.cursor = Cursor(name)
        """Where its reading is."""
        self.num_cuts = 0
        """Times that its front end died."""
        self.num_tries = 0
        self._given_name = name
        self.error: RemudaError | None = None
        self.had_no_replica = False
        """When it got its error, its front end knew of none that was ready."""
        self.has_ended = False

    def cut(self) -> None:
        """Its front end died."""
        self.num_cuts += 1
        if not self.cursor.positions:
            self.name = f"{self._given_name}-{self.num_cuts}"
            self.cursor = Cursor(self.name)
            self.requests = [
                msgspec.structs.replace(request, request_id=f"{self.name}.{index}")
                for index, request in enumerate(self.requests)
            ]

    def take(self, event: Event) -> None:
        """Raises AssertionError where something is missing or came twice."""
        self.cursor.note(event)
        if isinstance(event, Delta):
            tokens = self.token_ids[event.choice]
            assert event.position == len(tokens), (
                f"{self.name}: token {event.position} came where {len(tokens)} was due"
            )
            tokens += event.token_ids
            self.text[event.choice] += event.text
            self.logprobs[event.choice] += event.logprobs or ()
        elif isinstance(event, Finished):
            assert event.choice not in [end.choice for end in self.finished], f"{self.name} ended twice"
            self.finished.append(event)
        elif isinstance(event, Echo):
            assert event.choice not in self.echoes, f"{self.name}: the prompt came twice"
            self.echoes[event.choice] = event
        elif isinstance(event, Usage):
            self.usages.append(event)


def _echo(request: Request) -> EchoedPrompt | None:
    """Where its log-probabilities were asked for."""
    if request.sampling.prompt_logprobs is None:
        return None
    return EchoedPrompt(text_of(request.token_ids), request.token_ids, range(len(request.token_ids)), True)


class _Channel:
    """Each simulated call has a connection of its own, which ends with it."""

    async def close(self) -> None:
        """Nothing is left open."""


class _Client(ReplicaClient):
    """The real client over simulated connections."""

    def __init__(self, process: Process, address: str, chance: random.Random) -> None:
        super().__init__(address, process.name, randomness=chance)
        self._process = process

    def _dial(self) -> tuple[Any, Any]:
        return _Channel(), SimulatedStub(self._process, self.address)


class _JumpingClock(LoopClock):
    """A front end's own, which may go forward at once: its machine was suspended."""

    def __init__(self) -> None:
        self._ahead_s = 0.0

    def jump(self, seconds: float) -> None:
        self._ahead_s += seconds

    def now_s(self) -> float:
        return super().now_s() + self._ahead_s

    def call_at(self, when_s: float, callback: Callable[[], None]) -> Timer:
        return super().call_at(when_s - self._ahead_s, callback)


class _Fleet(Fleet):
    """The real one, watched over."""

    def _open(self, action: Submit | Attach, journal: Journal, keep: Keep | None) -> AsyncGenerator[Output, None]:
        stream = super()._open(action, journal, keep)
        if isinstance(action, Submit):
            assert journal._place is not None
            views = {view.id: view for view in self._table.views()}
            chosen = views[journal._place.replica]
            # One that is being repaired may take what no other can.
            is_last = chosen.is_connected and chosen.info.state.takes_requests
            is_last &= not any(view.is_ready for each, view in views.items() if each not in action.tried)
            assert chosen.is_ready or is_last, f"{journal.request_id} goes to {chosen.id}, known not to be ready"
        return stream


class SimulatedFrontEnd:
    """Args:
    name: names it in the leaders' logs.
    host: where it runs.
    network: through which it reaches leaders.
    seed: of its chance.
    """

    def __init__(self, name: str, host: str, network: Network, seed: str) -> None:
        self.host = host
        self.process = Process(name, host, network)
        self.clock = _JumpingClock()
        self.fleet = _Fleet(clock=self.clock)
        self.metrics = Metrics("m", self.fleet.replicas)
        self._chance = random.Random(f"{seed} {name}")

    async def join(self, replica: SimulatedReplica) -> None:
        """A leader serves; what the supervisor's event has a front end do."""
        leader = replica.leader
        while not leader.process.is_dead:
            client = _Client(self.process, leader.address, self._chance)
            try:
                await self.fleet.add(replica.name, client)
            except RemudaError:
                await client.close()
                await asyncio.sleep(1.0)
            else:
                return

    async def run(self, record: Record) -> None:
        """One client's request: from its beginning, or from where the client has come, if another front end had it."""
        try:
            # A client that has not seen its request's first event does not know its name, and asks anew.
            holders = (await self.fleet.find(record.name)).holders if record.cursor.positions else {}
            await self._run(record, holders)
        except RemudaError as error:
            if isinstance(error, Unavailable) and record.cursor.positions and record.num_tries < MAX_TRIES:
                record.num_tries += 1
                return  # it comes again, as it is told to
            record.error = error
            states = [info.state for info in self.fleet.replicas()]
            record.had_no_replica = not any(state.takes_requests for state in states)
        record.has_ended = True

    async def _run(self, record: Record, holders: dict[int, Holder]) -> None:
        choices = [
            Choice(
                index,
                Detokenizer(_TABLE, request.token_ids),
                StopStrings(record.stops),
                wants_logprobs=request.sampling.logprobs is not None,
                echo=_echo(request),
            )
            for index, request in enumerate(record.requests)
        ]
        stored = StoredCall("simulated", record.name, b"", 0.0)
        keeps = [Keep(stored.encode() if index == 0 else b"") for index in range(len(choices))]
        open_stream = Run(stored=stored, holders=holders).opener(self.fleet, record.requests, keeps)
        clock = self.clock
        limits = TimeLimits()
        live = LiveRequest(
            record.requests, choices, open_stream, limits, clock, clock.now_s(), self.metrics, keeps=keeps
        )
        remainder = Remainder(record.cursor)
        async for event in live.events():
            if (news := remainder.of(event)) is not None:
                record.take(news)
        # As cluster.frontend.service has it.
        usage = Usage(
            num_prompt_tokens=record.requests[0].num_prompt_tokens,
            num_completion_tokens=sum(choice.num_tokens for choice in choices),
            num_cached_tokens=max(choice.num_cached_tokens for choice in choices),
        )
        record.take(usage)

    async def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        await self.fleet.close()
