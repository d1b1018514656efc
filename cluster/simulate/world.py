"""One simulated deployment: replicas, front ends, clients, and what goes wrong, all drawn from a seed."""

import asyncio
import random
from typing import Any

from cluster.errors import Draining, Unavailable, UnknownStream
from cluster.simulate.faults import Fault, FaultKind, Scenario
from cluster.simulate.front_end import Record, SimulatedFrontEnd, text_of
from cluster.simulate.gang import logprobs_at, sequential_tokens
from cluster.simulate.leader import VOCAB_SIZE
from cluster.simulate.network import Connection, End, Network
from cluster.simulate.process import Process
from cluster.simulate.replica import NUM_RANKS, SimulatedReplica
from engine.errors import RemudaError
from engine.request import Request, SamplingParams

NUM_REPLICAS = 2
NUM_FRONT_ENDS = 2
START_S = 20.0
LONGEST_S = 600.0
"""Of a run: all requests have had their chances by then."""
FRONT_END_START_S = 2.0
SETTLE_S = 100.0
"""After the last request's end: grace times pass, and everything must have come to rest."""


class World:
    """Args:
    scenario: what happens; its seed is the source of all chance.
    """

    def __init__(self, scenario: Scenario) -> None:
        seed = str(scenario.seed)
        self.scenario = scenario
        self.network = Network(random.Random(f"{seed} network"))
        self._driver = Process("driver", "driver", self.network)
        self.front_ends = [SimulatedFrontEnd(f"f{i}", f"e{i}", self.network, seed) for i in range(NUM_FRONT_ENDS)]
        self.replicas = [
            SimulatedReplica(f"r{i}", f"h{i}", self.network, seed, self._announce) for i in range(NUM_REPLICAS)
        ]
        self.records: list[Record] = []
        self.ended_s = 0.0

    def _announce(self, replica: SimulatedReplica) -> None:
        for front_end in self.front_ends:
            if not front_end.process.is_dead:
                front_end.process.spawn(front_end.join(replica))

    async def run(self) -> None:
        """Raises AssertionError where a promise is broken, Stuck where somebody waits for ever."""
        await self._until_ready()
        troubles = [asyncio.create_task(self._cause(fault)) for fault in self.scenario.faults]
        clients = [asyncio.create_task(self._client(number)) for number in range(self.scenario.num_clients)]
        _, waiting = await asyncio.wait([*clients, *troubles], timeout=LONGEST_S)
        assert not waiting, f"after {LONGEST_S:g} s somebody still waits"
        await asyncio.gather(*clients, *troubles)
        await self._settle()
        self.ended_s = asyncio.get_running_loop().time()
        self.check()
        for front_end in self.front_ends:
            await front_end.kill()
        for replica in self.replicas:
            replica.kill()

    async def _until_ready(self) -> None:
        """All front ends know all replicas; not for ever, where one of them is lost already."""
        for _ in range(int(START_S / 0.1)):
            if all(len(front_end.fleet.replicas()) == NUM_REPLICAS for front_end in self.front_ends):
                return
            await asyncio.sleep(0.1)

    async def _settle(self) -> None:
        """Returns when nothing is under way any more, or has had its time."""
        for _ in range(int(SETTLE_S)):
            await asyncio.sleep(1.0)
            leaders = [replica.leader for replica in self.replicas]
            if all(leader.engine is not None and not leader.engine.has_work for leader in leaders) and not any(
                leader.server is not None and leader.server.num_live_requests for leader in leaders
            ):
                return

    async def _cause(self, fault: Fault) -> None:
        await asyncio.sleep(fault.at_s)
        replica, front_end = self.replicas[fault.replica], self.front_ends[fault.front_end]
        match fault.kind:
            case FaultKind.LEADER_DIES:
                replica.lose_leader()
            case FaultKind.RANK_DIES:
                replica.lose_rank(fault.front_end % NUM_RANKS)
            case FaultKind.HOST_DIES:
                replica.lose_leader()
                for number in range(NUM_RANKS):
                    replica.lose_rank(number)
            case FaultKind.RANK_STOPS:
                await replica.stop_rank(fault.front_end % NUM_RANKS, fault.duration_s)
            case FaultKind.LINK_CUT:
                self.network.cut(replica.host, front_end.host)
                await asyncio.sleep(fault.duration_s)
                self.network.heal(replica.host, front_end.host)
            case FaultKind.CONNECTION_RESET:
                self.network.reset(replica.host, front_end.host)
            case FaultKind.SLOW_STEPS:
                replica.slowness = 10.0
                await asyncio.sleep(fault.duration_s)
                replica.slowness = 1.0
            case FaultKind.SLOW_DISK:
                replica.disk_slowness = 30.0
                await asyncio.sleep(fault.duration_s)
                replica.disk_slowness = 1.0
            case FaultKind.SLOW_LINK:
                self.network.slowness = 100.0
                await asyncio.sleep(fault.duration_s)
                self.network.slowness = 1.0
            case FaultKind.FRAME_TWICE:
                self._change_next_message(replica, [0.0, 0.0])
            case FaultKind.FRAMES_SWAPPED:
                self._change_next_message(replica, [0.1])
            case FaultKind.CLOCK_JUMP:
                front_end.clock.jump(fault.duration_s)
            case FaultKind.DRAIN:
                await replica.leader.drain()
            case FaultKind.FRONT_END_DIES:
                await self._lose_front_end(fault.front_end)

    def lose_process(self, host: str) -> None:
        """kill -9 of the leader or the front end there."""
        for replica in self.replicas:
            if replica.host == host:
                replica.lose_leader()
        for index, front_end in enumerate(self.front_ends):
            if front_end.host == host:
                self._driver.spawn(self._lose_front_end(index))

    async def _lose_front_end(self, index: int) -> None:
        """Its clients go to another one; a new process takes its place."""
        former = self.front_ends[index]
        if former.process.is_dead:
            return
        await former.kill()
        await asyncio.sleep(FRONT_END_START_S)
        fresh = SimulatedFrontEnd(f"{former.process.name}+", former.host, self.network, str(self.scenario.seed))
        self.front_ends[index] = fresh
        for replica in self.replicas:
            if not replica.leader.process.is_dead and replica.leader.server is not None:
                fresh.process.spawn(fresh.join(replica))

    def _change_next_message(self, replica: SimulatedReplica, late_s: list[float]) -> None:
        """The next of this replica's leader arrives once for each entry, so many seconds too late."""

        def meddle(connection: Connection, sender: End, message: Any) -> list[tuple[Any, float]]:
            if sender.host != replica.host or message[0] != "message":
                return [(message, 0.0)]
            self.network.meddle = None
            return [(message, late) for late in late_s]

        self.network.meddle = meddle

    async def _client(self, number: int) -> None:
        chance = random.Random(f"{self.scenario.seed} client {number}")
        await asyncio.sleep(chance.uniform(0.0, self.scenario.spread_s))
        length = chance.randint(1, 40)
        prompt = [(position * 5 + chance.randrange(2)) % VOCAB_SIZE for position in range(length)]
        record = Record(
            f"c{number}",
            [
                Request(f"c{number}.{choice}", prompt, length, self._sampling(chance, number, choice))
                for choice in range(chance.choice([1, 1, 2]))
            ],
            (text_of([chance.randrange(VOCAB_SIZE)]),) if chance.random() < 0.3 else (),
        )
        self.records.append(record)
        while not record.has_ended:
            front_end = chance.choice(self.front_ends)
            if not front_end.process.is_dead:
                await asyncio.wait([front_end.process.spawn(front_end.run(record))])
                if not record.has_ended:
                    record.cut()
            await asyncio.sleep(chance.uniform(0.1, 3.0))

    def check(self) -> None:
        """What must hold at the end of every run."""
        for record in self.records:
            self._check_record(record)
        for replica in self.replicas:
            engine, server = replica.leader.engine, replica.leader.server
            assert engine is not None and server is not None, f"{replica.name} did not come back"
            stats = engine.stats()
            assert not (stats.num_blocks_used or stats.num_running or stats.num_waiting), f"{replica.name}: {stats}"
            engine.check_integrity()
            assert not server.num_live_requests, f"{replica.name} keeps requests"

    def _check_record(self, record: Record) -> None:
        assert record.has_ended, f"{record.name} has no end"
        for index, request in enumerate(record.requests):
            self._check_choice(record, index, request)
        if record.error is None:
            assert sorted(end.choice for end in record.finished) == list(range(len(record.requests)))
            assert [usage.num_prompt_tokens for usage in record.usages] == [record.requests[0].num_prompt_tokens]
            num_tokens = sum(map(len, record.token_ids))
            assert record.usages[0].num_completion_tokens == num_tokens, f"{record.name}: {record.usages[0]}"
        else:
            assert self._may_be_lost(record, record.error), f"{record.name} was lost: {record.error!r}"

    def _check_choice(self, record: Record, index: int, request: Request) -> None:
        name, token_ids, prompt = request.request_id, record.token_ids[index], request.token_ids
        expected = sequential_tokens(request.sampling, prompt, request.num_prompt_tokens, VOCAB_SIZE)
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
        if stop is None and shown and shown[-1] in request.sampling.stop_token_ids:
            shown = shown[:-1]  # an end token is not text
        assert record.text[index] == text_of(shown), f"{name}: another text"
        if request.sampling.prompt_logprobs is not None:
            due_of_prompt = [None, *(logprobs_at(prompt, position) for position in range(1, len(prompt)))]
            assert list(record.echoes[index].logprobs or ()) == due_of_prompt, f"{name}: its prompt's are others"

    def _may_be_lost(self, record: Record, error: RemudaError) -> bool:
        """What arrives where nobody serves is refused at once. And whoever lost front end and leader together has
        nobody left who knows of the request: that is more than a single fault."""
        if isinstance(error, UnknownStream):
            return record.num_cuts > 0 and any(replica.recovery.leader_life for replica in self.replicas)
        is_refused = isinstance(error, Draining) or (isinstance(error, Unavailable) and record.had_no_replica)
        return is_refused and not any(record.token_ids)

    def _sampling(self, chance: random.Random, number: int, choice: int) -> SamplingParams:
        ends = tuple(chance.sample(range(VOCAB_SIZE), 2))
        max_tokens = chance.randint(1, self.scenario.max_tokens)
        asks = random.Random(f"{self.scenario.seed} logprobs {number}")
        return SamplingParams(
            max_tokens,
            seed=number,
            choice=choice,
            stop_token_ids=ends,
            logprobs=asks.choice([None, 0]),
            prompt_logprobs=asks.choice([None, None, 0]),
        )
