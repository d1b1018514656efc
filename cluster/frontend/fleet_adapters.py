"""LoRA adapters of a fleet: on all replicas or on none, and brought to leaders that come later."""

import asyncio
import logging
from collections.abc import Callable, Sequence

from cluster.errors import Draining
from cluster.replica.client import ReplicaClient
from cluster.router.replica_table import ReplicaTable
from engine.errors import AdapterError, RemudaError
from engine.request import AdapterInfo

_log = logging.getLogger(__name__)


class FleetAdapters:
    """Args:
    table: the fleet's, which tells what each replica had when it was asked last.
    on_brought: called when a replica has what ``bring_soon`` was to bring.
    """

    def __init__(self, table: ReplicaTable, on_brought: Callable[[str, ReplicaClient], None]) -> None:
        self._table = table
        self._on_brought = on_brought
        self._equipped: dict[str, int] = {}
        """Replica → the life of its leader that has what it should."""
        self._bringing: dict[str, asyncio.Task[None]] = {}

    def are_at(self, replica_id: str, client: ReplicaClient) -> bool:
        """Whether this life of its leader has been brought everything."""
        return self._equipped.get(replica_id) == client.incarnation

    def bring_soon(self, replica_id: str, client: ReplicaClient) -> None:
        """As ``bring``, once at a time. Whoever asks the replica next may find that it failed, and try again."""
        if replica_id not in self._bringing:
            task = self._bringing[replica_id] = asyncio.create_task(self._try_to_bring(replica_id, client))
            task.add_done_callback(lambda _: self._bringing.pop(replica_id))

    async def _try_to_bring(self, replica_id: str, client: ReplicaClient) -> None:
        try:
            await self.bring(replica_id, client)
        except RemudaError as error:
            _log.warning("replica %s did not get its adapters yet: %s", replica_id, error)
        else:
            self._on_brought(replica_id, client)

    async def bring(self, replica_id: str, client: ReplicaClient) -> None:
        """A replica that joins has all that the others have; what it had before, its supervisor knows better. Raises
        Unavailable and its like; what cannot be loaded there is left out; one that drains has no use for any."""
        incarnation = client.incarnation
        others = [view.info for view in self._table.views() if view.id != replica_id]
        wanted = {adapter.name: adapter.path for info in others for adapter in info.adapters}
        for adapter in (await client.info()).adapters:
            wanted.pop(adapter.name, None)
        for name, path in wanted.items():
            try:
                await client.load_adapter(name, path)
            except (AdapterError, Draining) as error:  # another front end may have been first
                _log.warning("adapter %s was not loaded at replica %s: %s", name, replica_id, error)
        self._equipped[replica_id] = incarnation

    async def load(self, clients: Sequence[ReplicaClient], name: str, path: str) -> None:
        """Raises the first error; then it is nowhere."""
        answers = await asyncio.gather(*(client.load_adapter(name, path) for client in clients), return_exceptions=True)
        errors = [answer for answer in answers if isinstance(answer, BaseException)]
        if errors:
            have = [client for client, answer in zip(clients, answers, strict=True) if isinstance(answer, AdapterInfo)]
            await asyncio.gather(*(client.unload_adapter(name) for client in have), return_exceptions=True)
            raise errors[0]

    async def unload(self, clients: Sequence[ReplicaClient], name: str) -> None:
        """Raises the first error; where it could, it is gone."""
        answers = await asyncio.gather(*(client.unload_adapter(name) for client in clients), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
