"""The replicas of one served model, as the backend of the front end: a client per leader, a table that is kept fresh,
and the router that chooses."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace

from cluster.errors import Unavailable
from cluster.replica.client import ReplicaClient
from cluster.router.query import RoutingQuery
from cluster.router.replica_table import ReplicaTable
from cluster.router.router import default_router
from cluster.types import ReplicaInfo, ReplicaState
from engine.errors import InvalidRequest, RemudaError
from engine.request import AdapterInfo, Output, Request

REFRESH_INTERVAL_S = 0.5


class Fleet:
    """Implements cluster.frontend.backend.Backend. Empty at first: replicas join with ``add``.

    Args:
        on_all_lost: called once, when every replica has failed or cannot be reached any more. None: others will come.
    """

    def __init__(self, on_all_lost: Callable[[], None] | None = None) -> None:
        self._clients: dict[str, ReplicaClient] = {}
        self._on_all_lost = on_all_lost
        self._table = ReplicaTable()
        self._router = default_router(self._table)
        self._refresher: asyncio.Task[None] | None = None

    async def add(self, replica_id: str, client: ReplicaClient) -> None:
        """Connect to a leader and give it work from now on. Raises Unavailable where it does not answer."""
        await client.connect()
        await self._bring_adapters(client)
        self._clients[replica_id] = client
        await self._ask(replica_id, client)
        if self._refresher is None:
            self._refresher = asyncio.create_task(self._keep_fresh())

    async def _bring_adapters(self, client: ReplicaClient) -> None:
        """A replica that joins later has all that the others have."""
        wanted = {adapter.name: adapter.path for view in self._table.views() for adapter in view.info.adapters}
        for adapter in (await client.info()).adapters:
            wanted.pop(adapter.name, None)
        for name, path in wanted.items():
            await client.load_adapter(name, path)

    async def remove(self, replica_id: str) -> None:
        """The replica is gone; what still streams from it ends with Unavailable."""
        client = self._clients.pop(replica_id, None)
        if client is not None:
            self._table.remove(replica_id)
            await client.close()

    async def close(self) -> None:
        """Live streams end with Unavailable."""
        if self._refresher is not None:
            self._refresher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._refresher
        await asyncio.gather(*(client.close() for client in self._clients.values()))

    async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        """As cluster.frontend.backend.Backend says. A replica that turns out to be unreachable before the first output
        is passed over for another one."""
        tried: frozenset[str] = frozenset()
        while True:
            replica_id = self._router.route(RoutingQuery(request.token_ids, tried, request.adapter, request.cache_salt))
            has_begun = False
            try:
                async with contextlib.aclosing(self._clients[replica_id].generate(request)) as outputs:
                    async for output in outputs:
                        has_begun = True
                        yield output
                return
            except Unavailable:
                if has_begun or len(tried) + 1 >= len(self._clients):
                    raise
                tried |= {replica_id}

    def replicas(self) -> Sequence[ReplicaInfo]:
        """A replica that cannot be reached shows as failed."""
        return [
            view.info if view.is_connected else replace(view.info, state=ReplicaState.FAILED, error="not reachable")
            for view in self._table.views()
        ]

    async def load_adapter(self, name: str, path: str) -> None:
        """As cluster.frontend.backend.Backend says."""
        clients = self._connected()
        answers = await asyncio.gather(*(client.load_adapter(name, path) for client in clients), return_exceptions=True)
        errors = [answer for answer in answers if isinstance(answer, BaseException)]
        if errors:
            have = [client for client, answer in zip(clients, answers, strict=True) if isinstance(answer, AdapterInfo)]
            await asyncio.gather(*(client.unload_adapter(name) for client in have), return_exceptions=True)
        await self._refresh()
        if errors:
            raise errors[0]

    async def unload_adapter(self, name: str) -> None:
        """As cluster.frontend.backend.Backend says."""
        clients = self._connected()
        answers = await asyncio.gather(*(client.unload_adapter(name) for client in clients), return_exceptions=True)
        await self._refresh()
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer

    def _connected(self) -> list[ReplicaClient]:
        clients = [client for client in self._clients.values() if client.is_connected]
        if not clients:
            raise Unavailable("no replica is ready; try again shortly")
        return clients

    async def drain(self, replica: str) -> None:
        if replica not in self._clients:
            raise InvalidRequest(f"there is no replica {replica!r}; there are {', '.join(self._clients)}", "replica")
        self._table.update(await self._clients[replica].drain())

    async def _keep_fresh(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_INTERVAL_S)
            await self._refresh()
            if self._on_all_lost is not None and all(info.state is ReplicaState.FAILED for info in self.replicas()):
                self._on_all_lost()
                return

    async def _refresh(self) -> None:
        await asyncio.gather(*(self._ask(replica_id, client) for replica_id, client in self._clients.items()))

    async def _ask(self, replica_id: str, client: ReplicaClient) -> None:
        try:
            info = await client.info()
        except RemudaError:
            # The client logs why; for routing it is enough to know that nothing can go there.
            self._table.disconnect(replica_id)
            return
        if client.is_connected:
            self._table.update(replace(info, id=replica_id))
        else:
            self._table.disconnect(replica_id)
