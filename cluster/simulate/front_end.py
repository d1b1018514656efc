"""A front end of the simulation: the real router, journal, clients of leaders and live requests."""

import asyncio
import random
from collections.abc import AsyncGenerator, Callable
from typing import Any

from cluster.errors import Unavailable
from cluster.frontend.attempts import Attempts
from cluster.frontend.calls import TimeLimits, Usage
from cluster.frontend.choice import Choice, EchoedPrompt
from cluster.frontend.clock import LoopClock, Timer
from cluster.frontend.cursor import Remainder
from cluster.frontend.detokenizer import Detokenizer
from cluster.frontend.fleet import Fleet
from cluster.frontend.journal import Attach, Journal, Submit
from cluster.frontend.live_request import LiveRequest
from cluster.frontend.metrics import Metrics
from cluster.frontend.run import Run, keeps_of
from cluster.frontend.stop_strings import StopStrings
from cluster.frontend.stored_call import Holder, StoredCall
from cluster.frontend.tools.parser import ToolCallParser
from cluster.replica.client import ReplicaClient
from cluster.replica.keep import Keep
from cluster.simulate.calls import SimulatedStub
from cluster.simulate.network import Network
from cluster.simulate.process import Process
from cluster.simulate.record import MAX_TRIES, Record
from cluster.simulate.replica import SimulatedReplica
from cluster.simulate.vocabulary import TABLE, text_of
from engine.errors import RemudaError
from engine.request import Output, Request


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

    def _open(
        self, action: Submit | Attach, journal: Journal, keep: Keep | None, attempts: Attempts
    ) -> AsyncGenerator[Output, None]:
        stream = super()._open(action, journal, keep, attempts)
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
                Detokenizer(TABLE, request.token_ids),
                StopStrings(record.stops),
                wants_logprobs=request.sampling.logprobs is not None,
                echo=_echo(request),
                tools=ToolCallParser([record.tool]) if record.tool else None,
            )
            for index, request in enumerate(record.requests)
        ]
        stored = StoredCall("simulated", record.name, b"", 0.0)
        keeps = keeps_of(stored.encode(), len(choices))
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
