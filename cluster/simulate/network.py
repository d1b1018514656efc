"""Hosts that exchange messages with delays, and links that break: connections as TCP has them.

What is sent on a connection arrives once and in order, or the connection breaks. A link that is down holds messages
back; both ends notice by their keepalive, or never, if it heals before. A process that dies resets its connections.
"""

import asyncio
import hashlib
import random
from collections.abc import Callable
from typing import Any

KEEPALIVE_S = 15.0
"""As in cluster.rpc.channel: a silent peer is noticed within it."""


class Broken(Exception):
    """The connection is gone; what was not read yet is lost."""


class End:
    """One end of a connection."""

    def __init__(self, connection: "Connection", host: str) -> None:
        self._connection = connection
        self.host = host
        self._arrived: asyncio.Queue[Any] = asyncio.Queue()
        self._last_arrival_s = 0.0
        self._error: Broken | None = None

    def send(self, message: Any) -> None:
        """Raises Broken."""
        if self._error is not None:
            raise self._error
        self._connection.carry(self, message)

    async def receive(self) -> Any:
        """The next message. Raises Broken after the last that arrived."""
        if self._error is not None and self._arrived.empty():
            raise self._error
        message = await self._arrived.get()
        if isinstance(message, Broken):
            raise message
        return message

    def arrive(self, message: Any) -> None:
        if self._error is None:
            self._arrived.put_nowait(message)

    def break_off(self, reason: str) -> None:
        if self._error is None:
            self._error = Broken(reason)
            # What had arrived and was not read is lost with the connection, as after a reset.
            while not self._arrived.empty():
                self._arrived.get_nowait()
            self._arrived.put_nowait(self._error)

    @property
    def is_broken(self) -> bool:
        return self._error is not None


class Connection:
    """Made by Network.connect."""

    def __init__(self, network: "Network", first: str, second: str) -> None:
        self._network = network
        self.ends = (End(self, first), End(self, second))
        self._held: list[tuple[End, Any]] = []
        """Waiting for the link to come back."""

    def joins(self, first: str, second: str) -> bool:
        return {first, second} == {end.host for end in self.ends}

    def carry(self, sender: End, message: Any) -> None:
        receiver = self.ends[1] if sender is self.ends[0] else self.ends[0]
        for each, late_s in self._network.on_carry(self, sender, message):
            if self._network.is_down(sender.host, receiver.host):
                self._held.append((receiver, each))
            elif late_s:
                asyncio.get_running_loop().call_later(late_s, receiver.arrive, each)
            else:
                self._deliver(receiver, each)

    def _deliver(self, receiver: End, message: Any) -> None:
        loop = asyncio.get_running_loop()
        # Later by something: timers of one moment come in no order.
        arrival_s = max(receiver._last_arrival_s + 1e-7, loop.time() + self._network.draw_delay_s())
        receiver._last_arrival_s = arrival_s
        loop.call_at(arrival_s, receiver.arrive, message)

    def heal(self) -> None:
        if self._network.is_down(*(end.host for end in self.ends)):
            return
        held, self._held = self._held, []
        for receiver, message in held:
            self._deliver(receiver, message)

    def break_off(self, reason: str) -> None:
        for end in self.ends:
            end.break_off(reason)


Meddle = Callable[[Connection, End, Any], list[tuple[Any, float]]]
"""Sees each message as it leaves, may break things, and returns what is carried in its place: each with how many
seconds it comes too late, behind others, which no connection would do by itself."""


class Network:
    """Args:
    chance: draws delays.
    delay_s: the longest of one message, one way.
    """

    def __init__(self, chance: random.Random, delay_s: float = 0.002) -> None:
        self._chance = chance
        self._delay_s = delay_s
        self.slowness = 1.0
        self.num_messages = 0
        self._digest = hashlib.blake2b(digest_size=8)
        self.meddle: Meddle | None = None
        self._down: set[frozenset[str]] = set()
        self._stopped: set[str] = set()
        self._connections: list[Connection] = []
        self._listeners: dict[str, Callable[[End], None]] = {}

    def draw_delay_s(self) -> float:
        return self.slowness * self._chance.uniform(0.1, 1.0) * self._delay_s

    @property
    def digest(self) -> str:
        """Of all that was sent so far, and when."""
        return self._digest.hexdigest()

    def on_carry(self, connection: Connection, sender: End, message: Any) -> list[tuple[Any, float]]:
        """What is carried in place of this message."""
        self.num_messages += 1
        self._digest.update(f"{asyncio.get_running_loop().time()} {sender.host} {message}".encode())
        return [(message, 0.0)] if self.meddle is None else self.meddle(connection, sender, message)

    def listen(self, address: str, accept: Callable[[End], None]) -> None:
        """``accept`` gets the far end of each connection. An address is "host:number"."""
        self._listeners[address] = accept

    def close(self, address: str) -> None:
        self._listeners.pop(address, None)

    async def connect(self, host: str, address: str) -> End:
        """Raises Broken where nobody listens, or the link stays down for KEEPALIVE_S."""
        await asyncio.sleep(2 * self.draw_delay_s())
        server_host = address.partition(":")[0]
        if self.is_down(host, server_host):
            await asyncio.sleep(KEEPALIVE_S)
            raise Broken(f"{address} does not answer")
        accept = self._listeners.get(address)
        if accept is None:
            raise Broken(f"nobody listens at {address}")
        connection = Connection(self, host, server_host)
        self._connections = [other for other in self._connections if not other.ends[0].is_broken]
        self._connections.append(connection)
        accept(connection.ends[1])
        return connection.ends[0]

    def is_down(self, first: str, second: str) -> bool:
        return frozenset((first, second)) in self._down or not self._stopped.isdisjoint((first, second))

    def cut(self, first: str, second: str) -> None:
        """From now on nothing passes between the two; their connections break after KEEPALIVE_S unless it heals."""
        link = frozenset((first, second))
        if link in self._down or first == second:
            return
        self._down.add(link)
        asyncio.get_running_loop().call_later(KEEPALIVE_S, self._break_silent, first, second)

    def _break_silent(self, first: str, second: str) -> None:
        if self.is_down(first, second):
            self.reset(first, second)

    def heal(self, first: str, second: str) -> None:
        self._down.discard(frozenset((first, second)))
        for connection in self._connections:
            if connection.joins(first, second):
                connection.heal()

    def stop(self, host: str) -> None:
        """Whoever is there hangs: from now on nothing comes from it, and nothing is taken, as if its links were cut."""
        self._stopped.add(host)
        asyncio.get_running_loop().call_later(KEEPALIVE_S, self._break_stopped, host)

    def _break_stopped(self, host: str) -> None:
        for connection in self._connections_of(host) if host in self._stopped else ():
            connection.break_off(f"{host} does not answer")

    def _connections_of(self, host: str) -> list[Connection]:
        return [each for each in self._connections if host in (each.ends[0].host, each.ends[1].host)]

    def resume(self, host: str) -> None:
        """It goes on, or is dead."""
        self._stopped.discard(host)
        for connection in self._connections_of(host):
            connection.heal()

    def reset(self, first: str, second: str) -> None:
        """All connections between the two break at once."""
        for connection in self._connections:
            if connection.joins(first, second):
                connection.break_off(f"the connection between {first} and {second} was reset")
