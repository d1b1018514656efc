"""The transports of the step channel: the same promises of all, and what they do about peers that die or lie."""

import contextlib
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

from engine.errors import RankFailure
from engine.executor.channel import ChannelClosed, LeaderChannel, RankChannel
from engine.executor.connection_door import ConnectionDoor
from engine.executor.handshake import new_secret
from engine.executor.queue_channel import queue_channel
from engine.executor.relay import HostRelay
from engine.executor.socket_hub import RING_BYTES, SocketHub
from engine.executor.socket_rank import SocketRankChannel
from engine.executor.sockets import connect
from tests.support.shared_memory import left_since, shared_memory_files

WAIT_S = 20.0


def unix_name() -> str:
    return f"unix:@remuda-test-{uuid.uuid4().hex}"


class Gang:
    """A leader's end and its ranks' ends, over one transport."""

    def __init__(self, leader: LeaderChannel, ranks: list[RankChannel], closers: list[Callable[[], None]]) -> None:
        self.leader, self.ranks, self._closers = leader, ranks, closers

    def close(self) -> None:
        for rank in self.ranks:
            rank.close()
        self.leader.close()
        for closer in self._closers:
            closer()

    def collect(self, count: int) -> dict[int, list[bytes]]:
        found: dict[int, list[bytes]] = {}
        for _ in range(count):
            rank, data = self.leader.receive(WAIT_S)
            found.setdefault(rank, []).append(data)
        return found


def make_gang(transport: str) -> Gang:
    if transport == "queue":
        leader, rank = queue_channel()
        return Gang(leader, [rank], [])
    secret = new_secret()
    hub = SocketHub(range(3), secret, [unix_name(), "tcp:127.0.0.1:0"])
    unix, tcp = hub.addresses
    if transport == "relay":
        local = unix_name()
        relay = HostRelay(tcp, local, secret, [1, 2], WAIT_S)
        addresses, closers = [unix, local, local], [relay.close]
    else:
        addresses, closers = {"unix": [unix] * 3, "tcp": [tcp] * 3, "mixed": [unix, tcp, unix]}[transport], []
    return Gang(hub, [SocketRankChannel(a, secret, [i], WAIT_S) for i, a in enumerate(addresses)], closers)


@pytest.fixture(params=["queue", "unix", "tcp", "mixed", "relay"])
def gang(request: pytest.FixtureRequest) -> Iterator[Gang]:
    gang = make_gang(request.param)
    yield gang
    gang.close()


def test_order_is_kept_both_ways(gang: Gang) -> None:
    messages = [str(i).encode() * (1 + i % 5) for i in range(200)]
    for message in messages:
        gang.leader.send(message)
    for rank in gang.ranks:
        for message in messages:
            assert rank.receive(WAIT_S) == message
            rank.send(message)
    found = gang.collect(len(messages) * len(gang.ranks))
    assert found == dict.fromkeys(range(len(gang.ranks)), messages)


def test_messages_of_every_size_arrive_whole(gang: Gang) -> None:
    """From nothing, past the border between socket and ring, to several times the ring."""
    sizes = [0, 1, 8191, 8192, 100_000, 1_500_000, 1_500_000, 1_500_000, RING_BYTES, 3 * RING_BYTES, 5, 70_000]
    messages = [bytes([i]) * size for i, size in enumerate(sizes)]

    def echo(rank: RankChannel) -> None:
        for _ in messages:
            rank.send(rank.receive(WAIT_S))

    threads = [threading.Thread(target=echo, args=(rank,)) for rank in gang.ranks]
    receiver: dict[int, list[bytes]] = {}
    collector = threading.Thread(target=lambda: receiver.update(gang.collect(len(messages) * len(gang.ranks))))
    for thread in [*threads, collector]:
        thread.start()
    for message in messages:
        gang.leader.send(message)
    for thread in [*threads, collector]:
        thread.join(WAIT_S)
    assert receiver == dict.fromkeys(range(len(gang.ranks)), messages)


def test_silence_ends_in_a_timeout(gang: Gang) -> None:
    with pytest.raises(TimeoutError):
        gang.leader.receive(0.01)
    with pytest.raises(TimeoutError):
        gang.ranks[0].receive(0.01)


def test_what_a_rank_sent_before_it_left_still_arrives(gang: Gang) -> None:
    last = len(gang.ranks) - 1
    gang.ranks[last].send(b"last words")
    gang.ranks[last].close()
    assert gang.leader.receive(WAIT_S) == (last, b"last words")
    with pytest.raises(RankFailure) as failure:
        gang.leader.receive(WAIT_S)
    assert failure.value.rank == last


def test_ranks_see_the_leader_leave(gang: Gang) -> None:
    seen: list[int] = []

    def watch(index: int) -> None:
        gang.ranks[index].wait_closed()
        seen.append(index)

    watchers = [threading.Thread(target=watch, args=(index,)) for index in range(len(gang.ranks))]
    for watcher in watchers:
        watcher.start()
    gang.leader.close()
    for rank in gang.ranks:
        with pytest.raises(ChannelClosed):
            rank.receive(WAIT_S)
    for watcher in watchers:
        watcher.join(WAIT_S)
    assert sorted(seen) == list(range(len(gang.ranks)))
    with pytest.raises(ChannelClosed):
        gang.leader.receive(WAIT_S)


def test_closing_wakes_a_waiting_receiver(gang: Gang) -> None:
    outcome: list[BaseException] = []

    def wait() -> None:
        try:
            gang.leader.receive(None)
        except ChannelClosed as error:
            outcome.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    gang.leader.close()
    waiting.join(WAIT_S)
    assert len(outcome) == 1


PEER = """
import sys, signal
from engine.executor.socket_rank import SocketRankChannel
channel = SocketRankChannel(sys.argv[1], sys.argv[2], [int(sys.argv[3])], 20.0)
channel.send(b"here")
channel.receive(None)
"""


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_kill_9_of_a_rank_is_seen_at_once_and_leaves_nothing(transport: str) -> None:
    before = shared_memory_files()
    secret = new_secret()
    hub = SocketHub([0], secret, [unix_name() if transport == "unix" else "tcp:127.0.0.1:0"])
    process = subprocess.Popen([sys.executable, "-c", PEER, hub.addresses[0], secret, "0"])
    try:
        assert hub.receive(WAIT_S) == (0, b"here")
        killed_at = time.monotonic()
        process.send_signal(signal.SIGKILL)
        with pytest.raises(RankFailure, match="rank 0") as failure:
            hub.receive(WAIT_S)
        assert failure.value.rank == 0 and time.monotonic() - killed_at < 2.0
    finally:
        process.kill()
        process.wait()
        hub.close()
    assert not left_since(before)


def test_kill_9_of_a_relay_loses_its_ranks_and_frees_them() -> None:
    script = """
import sys, signal
from engine.executor.relay import HostRelay
relay = HostRelay(sys.argv[1], sys.argv[2], sys.argv[3], [1, 2], 20.0)
print("ready", flush=True)
signal.pause()
"""
    secret = new_secret()
    hub = SocketHub(range(3), secret, [unix_name(), "tcp:127.0.0.1:0"])
    local = unix_name()
    process = subprocess.Popen(
        [sys.executable, "-c", script, hub.addresses[1], local, secret], stdout=subprocess.PIPE, text=True
    )
    ranks = []
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        ranks = [SocketRankChannel(a, secret, [i], WAIT_S) for i, a in enumerate([hub.addresses[0], local, local])]
        for i, rank in enumerate(ranks):
            rank.send(b"here")
            assert hub.receive(WAIT_S) == (i, b"here")
        process.kill()
        lost = set()
        for _ in range(2):
            with pytest.raises(RankFailure) as failure:
                hub.receive(WAIT_S)
            lost.add(failure.value.rank)
        assert lost == {1, 2}
        with pytest.raises(ChannelClosed):
            ranks[1].receive(WAIT_S)
    finally:
        process.kill()
        process.communicate()
        for rank in ranks:
            rank.close()
        hub.close()


def test_a_rank_behind_a_relay_that_dies_is_named() -> None:
    gang = make_gang("relay")
    try:
        gang.ranks[2].close()
        with pytest.raises(RankFailure) as failure:
            gang.leader.receive(WAIT_S)
        assert failure.value.rank == 2
        gang.ranks[1].send(b"still here")
        assert gang.leader.receive(WAIT_S) == (1, b"still here")
    finally:
        gang.close()


def test_nothing_listens_once_all_ranks_are_there() -> None:
    gang = make_gang("tcp")
    try:
        assert isinstance(gang.leader, SocketHub)
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            try:
                connect(gang.leader.addresses[1], 1.0).close()
            except OSError:
                break
        else:
            pytest.fail("the address still accepts connections")
    finally:
        gang.close()


def test_a_rank_that_does_not_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import engine.executor.sockets as sockets

    monkeypatch.setattr(sockets.send_all, "__defaults__", (0.3,))
    gang = make_gang("tcp")
    try:
        with pytest.raises(RankFailure) as failure:
            for _ in range(100):
                gang.leader.send(b"x" * 2**20)
        assert failure.value.rank == 0
    finally:
        gang.close()


def test_idle_channels_use_no_processor_time(gang: Gang) -> None:
    waiting = [threading.Thread(target=_swallow, args=(end,)) for end in (gang.leader, *gang.ranks)]
    for thread in waiting:
        thread.start()
    start = time.process_time()
    waiting[0].join(0.5)
    assert waiting[0].is_alive()
    assert time.process_time() - start < 0.1
    gang.close()
    for thread in waiting:
        thread.join(WAIT_S)
        assert not thread.is_alive()


def _swallow(end: LeaderChannel | RankChannel) -> None:
    with contextlib.suppress(ChannelClosed, RankFailure):
        end.receive(None)


def test_a_rank_waits_for_a_relay_that_starts_later() -> None:
    secret, address = new_secret(), unix_name()
    found: list[SocketRankChannel] = []
    early = threading.Thread(target=lambda: found.append(SocketRankChannel(address, secret, [0], WAIT_S)))
    early.start()
    early.join(0.2)
    assert found == []
    hub = SocketHub([0], secret, [address])
    early.join(WAIT_S)
    try:
        hub.send(b"plan")
        assert found[0].receive(WAIT_S) == b"plan"
    finally:
        found[0].close()
        hub.close()


def test_a_rank_that_waits_already_may_come_before_the_door_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    secret, address = new_secret(), unix_name()
    open_door = ConnectionDoor.__init__

    def open_slowly(self: ConnectionDoor, *arguments: Any) -> None:
        open_door(self, *arguments)
        early.join(0.5)

    found: list[SocketRankChannel] = []
    early = threading.Thread(target=lambda: found.append(SocketRankChannel(address, secret, [0], WAIT_S)))
    early.start()
    monkeypatch.setattr(ConnectionDoor, "__init__", open_slowly)
    with closing(SocketHub([0], secret, [address])) as hub:
        early.join(WAIT_S)
        with closing(found[0]):
            hub.send(b"plan")
            assert found[0].receive(WAIT_S) == b"plan"


def test_a_leader_that_never_opens_is_given_up() -> None:
    with pytest.raises(ChannelClosed, match="cannot be reached"):
        SocketRankChannel(unix_name(), new_secret(), [0], 0.2)
