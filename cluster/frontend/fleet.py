"""The replicas of one served model, as the backend of the front end: a client per leader, a table that is kept fresh,
and the router that chooses."""

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from dataclasses import replace

import msgspec
from opentelemetry.trace import Tracer

from cluster.errors import Draining, Unavailable, UnknownStream
from cluster.frontend.attempts import Attempts
from cluster.frontend.clock import Clock, LoopClock
from cluster.frontend.fleet_adapters import FleetAdapters
from cluster.frontend.journal import Attach, FailoverPolicy, Finish, Journal, Submit, Wait, attempt_of, index_of
from cluster.frontend.stored_call import FoundCall, Holder, StoredCall
from cluster.replica.client import ReplicaClient
from cluster.replica.keep import Keep
from cluster.router.query import RoutingQuery
from cluster.router.replica_table import ReplicaTable
from cluster.router.router import default_router
from cluster.telemetry.tracing import NO_TRACER
from cluster.types import ReplicaInfo, ReplicaState
from engine.errors import EngineFailure, InvalidRequest, RemudaError
from engine.request import Output, Request

_log = logging.getLogger(__name__)

REFRESH_INTERVAL_S = 0.5
IDLE_REFRESH_INTERVAL_S = 2.0
"""Where all replicas are ready and have nothing to do: asking is most of what an idle front end and leader cost."""


class Fleet:
    """Implements cluster.frontend.backend.Backend. Empty at first: replicas join with ``add``.

    Args:
        on_all_lost: called once, when for ``lost_after_s`` every replica has failed or cannot be reached, and nobody
            repairs one (``await_leader``). None: others will come.
        policy: how requests are saved from replicas that are lost.
        clock: for that.
        lost_after_s: a leader may be replaced within it.
        migrate_after_s: so long what runs at a replica that drains may finish there.
        tracer: for the spans of attempts.
    """

    def __init__(
        self,
        on_all_lost: Callable[[], None] | None = None,
        policy: FailoverPolicy = FailoverPolicy(),
        clock: Clock = LoopClock(),
        lost_after_s: float = 30.0,
        migrate_after_s: float = 10.0,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        self._clients: dict[str, ReplicaClient] = {}
        self._expected: set[str] = set()
        """Replicas that are to join and have not answered yet: any request may be theirs."""
        self._repaired: set[str] = set()
        """Those whose leader is being replaced: they are not lost, however long that takes."""
        self._on_all_lost = on_all_lost
        self._policy = policy
        self._clock = clock
        self._lost_after_s = lost_after_s
        self._migrate_after_s = migrate_after_s
        self._tracer = tracer
        self._changed = asyncio.Event()
        self._has_work = asyncio.Event()
        self._asking: set[asyncio.Task[None]] = set()
        self._aside: frozenset[str] = frozenset()
        self._draining: dict[str, ReplicaClient] = {}
        """Those that take no new requests, and what runs there is to move."""
        self._table = ReplicaTable()
        self._adapters = FleetAdapters(self._table, self._ask_soon)
        self._router = default_router(self._table)
        self._refresher: asyncio.Task[None] | None = None

    async def add(self, replica_id: str, client: ReplicaClient) -> None:
        """Connect to a leader and give it work from now on. One that was known as this replica has been replaced by it.
        Raises Unavailable where it does not answer; until it is added or removed, it is expected to answer later."""
        self._expected.add(replica_id)
        self._repaired.discard(replica_id)
        self._tell()
        await client.connect()
        await self._adapters.bring(replica_id, client)
        self._expected.discard(replica_id)
        before, self._clients[replica_id] = self._clients.get(replica_id), client
        client.on_change = lambda: self._ask_soon(replica_id, client)
        await self._ask(replica_id, client)
        if before is not None:
            await before.close()
        if self._refresher is None:
            self._refresher = asyncio.create_task(self._keep_fresh())

    async def await_leader(self, replica_id: str) -> None:
        """Whoever supervises this replica replaces its leader, and says when the new one can be added, or that there
        will be none."""
        self._repaired.add(replica_id)
        self._tell()
        if (client := self._clients.get(replica_id)) is not None:
            await client.retire()

    async def remove(self, replica_id: str) -> None:
        """The replica is gone; what still streams from it ends with Unavailable."""
        self._expected.discard(replica_id)
        self._repaired.discard(replica_id)
        self._draining.pop(replica_id, None)
        client = self._clients.pop(replica_id, None)
        if client is not None:
            self._table.remove(replica_id)
            self._tell()
            await client.close()

    async def close(self) -> None:
        """Live streams end with Unavailable."""
        if self._refresher is not None:
            self._refresher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._refresher
        await asyncio.gather(*(client.close() for client in self._clients.values()))

    def generate(
        self, request: Request, keep: Keep | None = None, holder: Holder | None = None
    ) -> AsyncGenerator[Output, None]:
        """As cluster.frontend.backend.Backend says. What is lost with a replica, or with the connection to it, goes on
        at another one, or at the same one when it is back: the reader sees neither a gap nor a repetition."""
        held_by = (holder.replica, holder.incarnation, holder.request_id) if holder is not None else None
        return self._run(Journal(request, self._policy, held_by), keep)

    async def find(self, call_id: str) -> FoundCall:
        """As cluster.frontend.backend.Backend says. All leaders are asked: a request may have moved."""
        ids = list(self._clients)
        num_silent = len(self._expected.difference(ids))
        answers = await asyncio.gather(*(self._clients[each].find(call_id) for each in ids), return_exceptions=True)
        holders: dict[int, Holder] = {}
        stored: StoredCall | None = None
        for replica_id, answer in zip(ids, answers, strict=True):
            if isinstance(answer, BaseException):
                if not isinstance(answer, RemudaError):
                    raise answer
                num_silent += not isinstance(answer, UnknownStream)
                continue
            if answer.client_request:
                stored = StoredCall.decode(answer.client_request)
            for request_id in answer.request_ids:
                index = index_of(request_id)
                before = holders.get(index)
                if before is None or attempt_of(request_id) >= attempt_of(before.request_id):
                    holders[index] = Holder(replica_id, answer.incarnation, request_id)
        if stored is None and (num_silent or not ids):
            raise Unavailable(f"not every replica could be asked for request {call_id!r}; try again")
        if stored is None:
            raise UnknownStream(f"nobody has request {call_id!r} (any more); ask anew")
        return FoundCall(stored, holders)

    def abandon(self, found: FoundCall) -> None:
        """As cluster.frontend.backend.Backend says."""
        for holder in found.holders.values():
            if (client := self._clients.get(holder.replica)) is not None:
                client.abandon(holder.request_id, even_if_read=True)

    async def _run(self, journal: Journal, keep: Keep | None) -> AsyncGenerator[Output, None]:
        self._has_work.set()
        attempts = Attempts(self._tracer, journal.trace)
        try:
            while not journal.is_finished:
                attempts.routing()
                action = journal.next_action(self._clock.now_s(), self._table.views(), bool(self._repaired))
                self._abandon(journal)
                if isinstance(action, Wait):
                    await self._news(action.until_s)
                    continue
                if isinstance(action, Finish):
                    yield action.output
                    return
                try:
                    stream = self._open(action, journal, keep, attempts)
                    async with contextlib.aclosing(stream) as outputs:
                        async for output in outputs:
                            if (news := journal.take(output)) is not None:
                                yield news
                    if not journal.is_finished:
                        raise EngineFailure("the replica's stream ended before the request did")
                except RemudaError as error:
                    attempts.lost(error, journal.num_tokens)
                    journal.lost(error, self._clock.now_s())
                    _log.info("request %s was lost at token %d: %s", journal.request_id, journal.num_tokens, error)
        finally:
            attempts.close(journal.num_tokens)
            if keep is None or not keep.is_wanted:
                journal.close()
            self._abandon(journal)

    def _open(
        self, action: Submit | Attach, journal: Journal, keep: Keep | None, attempts: Attempts
    ) -> AsyncGenerator[Output, None]:
        """Raises Unavailable where there is nobody to send it to."""
        if isinstance(action, Attach):
            client = self._client(action.replica)
            attempts.sent(action.replica, action.request_id, action.num_tokens)
            return client.resume(action.request_id, action.num_tokens, action.num_prompt_logprobs, keep)
        request = action.request
        query = RoutingQuery(request.token_ids, action.tried, request.adapter, request.cache_salt)
        replica_id = self._router.route(query)
        client = self._client(replica_id)
        journal.sent(replica_id, client.incarnation, request.request_id)
        trace = attempts.sent(replica_id, request.request_id, journal.num_tokens)
        return client.generate(msgspec.structs.replace(request, trace=trace) if trace else request, keep)

    def _client(self, replica_id: str) -> ReplicaClient:
        client = self._clients.get(replica_id)
        if client is None:
            raise Unavailable(f"replica {replica_id} is gone")
        return client

    def _abandon(self, journal: Journal) -> None:
        for replica_id, request_id in journal.take_abandoned():
            if (client := self._clients.get(replica_id)) is not None:
                client.abandon(request_id)

    async def _news(self, until_s: float) -> None:
        """Returns when something is new of the replicas, or at that time."""
        changed = self._changed
        timer = self._clock.call_at(until_s, self._tell)
        try:
            await changed.wait()
        finally:
            timer.cancel()

    def _tell(self) -> None:
        """Whoever waits for news of the replicas looks again."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def changed(self) -> None:
        """Returns with the next news of any replica."""
        await self._changed.wait()

    def replicas(self) -> Sequence[ReplicaInfo]:
        """A replica that cannot be reached shows as failed."""
        return [
            view.info if view.is_connected else replace(view.info, state=ReplicaState.FAILED, error="not reachable")
            for view in self._table.views()
        ]

    async def load_adapter(self, name: str, path: str) -> None:
        """As cluster.frontend.backend.Backend says."""
        try:
            await self._adapters.load(self._connected(), name, path)
        finally:
            await self._refresh()

    async def unload_adapter(self, name: str) -> None:
        """As cluster.frontend.backend.Backend says."""
        try:
            await self._adapters.unload(self._connected(), name)
        finally:
            await self._refresh()

    def _connected(self) -> list[ReplicaClient]:
        clients = [client for client in self._clients.values() if client.is_connected]
        if not clients:
            raise Unavailable("no replica is ready; try again shortly")
        return clients

    def dump(self, replica: str) -> AsyncGenerator[bytes, None]:
        """As cluster.frontend.backend.Backend says."""
        if not replica and len(self._clients) == 1:
            replica = next(iter(self._clients))
        if replica not in self._clients:
            raise InvalidRequest(f"name one of the replicas: {', '.join(self._clients)}", "replica")
        return self._clients[replica].dump()

    async def drain(self, replica: str, migrate_after_s: float | None = None) -> None:
        """As cluster.frontend.backend.Backend says. What still runs there after ``migrate_after_s`` (None: the fleet's
        own) goes on at another replica, if one is ready by then."""
        if replica not in self._clients:
            raise InvalidRequest(f"there is no replica {replica!r}; there are {', '.join(self._clients)}", "replica")
        client = self._draining[replica] = self._clients[replica]
        self._table.update(replace(await client.drain(), id=replica))
        self._tell()
        delay_s = self._migrate_after_s if migrate_after_s is None else migrate_after_s
        self._clock.call_at(self._clock.now_s() + delay_s, lambda: self._migrate(replica, client))

    def _note_drain(self, replica_id: str, client: ReplicaClient, state: ReplicaState) -> None:
        """Whoever had it drained may have told another front end, or the replica's supervisor."""
        if state is not ReplicaState.DRAINING:
            self._draining.pop(replica_id, None)
        elif self._draining.get(replica_id) is not client:
            self._draining[replica_id] = client
            due_s = self._clock.now_s() + self._migrate_after_s
            self._clock.call_at(due_s, lambda: self._migrate_drained(replica_id, client))

    def _migrate_drained(self, replica_id: str, client: ReplicaClient) -> None:
        if self._draining.get(replica_id) is client:
            self._migrate(replica_id, client)

    def set_aside(self, replicas: Collection[str]) -> None:
        """These (and, until the next call, no others) will end soon. While another replica is ready nothing new goes
        to them, and what still runs there after a while goes on elsewhere."""
        before, self._aside = self._aside, frozenset(replicas)
        for replica_id in (self._aside ^ before) & self._clients.keys():
            client = self._clients[replica_id]
            self._ask_soon(replica_id, client)
            if replica_id in self._aside:
                self._clock.call_at(
                    self._clock.now_s() + self._migrate_after_s, functools.partial(self._leave, replica_id, client)
                )

    def _leave(self, replica_id: str, client: ReplicaClient) -> None:
        if replica_id in self._aside:
            self._migrate(replica_id, client)

    def _state_for_routing(self, replica_id: str, state: ReplicaState) -> ReplicaState:
        others_are_ready = any(view.is_ready and view.id not in self._aside for view in self._table.views())
        is_aside = state is ReplicaState.READY and replica_id in self._aside and others_are_ready
        return ReplicaState.DRAINING if is_aside else state

    def _migrate(self, replica_id: str, client: ReplicaClient) -> None:
        if self._clients.get(replica_id) is client and any(view.is_ready for view in self._table.views()):
            client.release(Draining(f"replica {replica_id} is draining"))

    async def _keep_fresh(self) -> None:
        lost_since_s: float | None = None
        while True:
            await self._pause()
            await self._refresh()
            now_s = self._clock.now_s()
            if self._repaired or any(info.state is not ReplicaState.FAILED for info in self.replicas()):
                lost_since_s = None
            elif lost_since_s is None:
                lost_since_s = now_s
            elif self._on_all_lost is not None and now_s >= lost_since_s + self._lost_after_s:
                self._on_all_lost()
                return

    async def _pause(self) -> None:
        """Until it is time to ask the replicas again: a request ends the long pause of idle ones."""
        if self._is_idle:
            # Not wait_for: in Python 3.11 it forgets that it is cancelled where the event has just been set.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(IDLE_REFRESH_INTERVAL_S - REFRESH_INTERVAL_S):
                    await self._has_work.wait()
        self._has_work.clear()
        await asyncio.sleep(REFRESH_INTERVAL_S)

    @property
    def _is_idle(self) -> bool:
        return all(
            view.is_connected
            and view.info.state is ReplicaState.READY
            and view.info.num_running + view.info.num_waiting == 0
            and view.info.progress_age_s == 0.0  # gauges are those of the last step, and the first may take long
            for view in self._table.views()
        )

    async def _refresh(self) -> None:
        await asyncio.gather(*(self._ask(replica_id, client) for replica_id, client in self._clients.items()))

    def _ask_soon(self, replica_id: str, client: ReplicaClient) -> None:
        """The connection was made or lost."""
        if not client.is_connected:
            if self._clients.get(replica_id) is client:
                self._table.disconnect(replica_id)
                self._tell()
            return
        task = asyncio.create_task(self._ask(replica_id, client))
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    async def _ask(self, replica_id: str, client: ReplicaClient) -> None:
        info: ReplicaInfo | None = None
        with contextlib.suppress(RemudaError):
            # The client logs why not; for routing it is enough to know that nothing can go there.
            info = await client.info()
        if self._clients.get(replica_id) is not client:
            return
        if client.is_connected and not self._adapters.are_at(replica_id, client):
            info = None
            self._adapters.bring_soon(replica_id, client)
        if info is not None and client.is_connected:
            self._note_drain(replica_id, client, info.state)
            state = self._state_for_routing(replica_id, info.state)
            self._table.update(replace(info, id=replica_id, state=state))
        else:
            self._table.disconnect(replica_id)
        self._tell()
