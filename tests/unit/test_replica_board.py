"""The replicas' news to the control process, and how each side sees that the other is gone; real sockets, no Ray."""

import socket
import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest

from cluster.control.replica_board import BoardLink, ReplicaBoard
from cluster.replica.events import Event, Failed, GangFormed, ReplicaEnded, ReplicaReady, encode_event
from cluster.replica.side_door import knock
from engine.executor.channel import ChannelClosed

WAIT_S = 60.0


@pytest.fixture
def board() -> Iterator[ReplicaBoard]:
    opened = ReplicaBoard("127.0.0.1")
    yield opened
    opened.close()


def ready(name: str, port: int) -> ReplicaReady:
    return ReplicaReady(name, f"127.0.0.1:{port}", 8)


def told(board: ReplicaBoard, is_enough: Callable[[list[Event]], bool]) -> list[Event]:
    """All events from now on, until they are enough."""
    events: list[Event] = []
    deadline_s = time.monotonic() + WAIT_S
    while not is_enough(events):
        assert time.monotonic() < deadline_s, events
        events += board.take()
        time.sleep(0.01)
    return events


class Wire:
    """Forwards connections to the board; ``cut`` loses them on the way, ``deaf`` only what the board answers."""

    def __init__(self, address: str) -> None:
        _, host, port = address.split(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp:127.0.0.1:{self._listener.getsockname()[1]}"
        self.is_cut = False
        self.num_lost_answers = 0
        self._lose_answers = False
        threading.Thread(target=self._run, daemon=True).start()

    def lose_answers(self, lose: bool) -> None:
        self._lose_answers = lose

    def close(self) -> None:
        self._listener.close()

    def _run(self) -> None:
        while True:
            try:
                link, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._forward, args=(link,), daemon=True).start()

    def _forward(self, link: socket.socket) -> None:
        """The handshake is three messages; the answer is what the board sends after its proof (8 + 32, then 32)."""
        with link:
            if self.is_cut:
                return
            with socket.create_connection(self._target) as other:
                sender = threading.Thread(target=_pump, args=(link, other), daemon=True)
                sender.start()
                passed = 0
                while data := other.recv(1 << 16):
                    passed += len(data)
                    if self._lose_answers and passed > 8 + 32 + 32:
                        self.num_lost_answers += 1
                        # Not close alone: the other thread still reads there.
                        link.shutdown(socket.SHUT_RDWR)
                        return
                    link.sendall(data)


def _pump(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(1 << 16):
            target.sendall(data)
    except OSError:
        return  # the other direction has ended the connection


@pytest.fixture
def wire(board: ReplicaBoard) -> Iterator[Wire]:
    made = Wire(board.address)
    yield made
    made.close()


def test_events_of_replicas_come_in_order_and_names_are_never_given_twice(board: ReplicaBoard) -> None:
    links = [BoardLink(board.address, board.secret) for _ in range(3)]
    assert [link.name for link in links] == ["r0", "r1", "r2"]
    sent: dict[str, list[Event]] = {
        link.name: [*(ready(link.name, port) for port in range(20)), ReplicaEnded(link.name)] for link in links
    }
    for link in links:
        for event in sent[link.name]:
            link.post(event)
    for link in links:
        link.close()
        assert not link.is_cut
    events = board.take()
    assert {name: [event for event in events if event.replica == name] for name in sent} == sent  # type: ignore[union-attr]
    late = BoardLink(board.address, board.secret)
    assert late.name == "r3"
    late.close()


def test_what_is_told_again_for_want_of_an_answer_comes_once(board: ReplicaBoard, wire: Wire) -> None:
    link = BoardLink(wire.address, board.secret)
    wire.lose_answers(True)
    sent: list[Event] = [
        ready(link.name, 1),
        GangFormed(link.name, 1, 8, {}),
        Failed("RankFailure", "it broke", link.name),
    ]
    for event in sent:
        link.post(event)
    events = told(board, lambda events: len(events) >= len(sent) and wire.num_lost_answers >= 2)
    wire.lose_answers(False)
    link.post(ReplicaEnded(link.name))
    link.close()
    assert not link.is_cut
    assert [*events, *board.take()] == [*sent, ReplicaEnded(link.name)]


def test_a_short_silence_ends_nothing_and_loses_nothing(board: ReplicaBoard, wire: Wire) -> None:
    link = BoardLink(wire.address, board.secret)
    wire.is_cut = True
    link.post(ready(link.name, 1))
    time.sleep(0.5)  # the fault itself
    assert board.take() == []
    wire.is_cut = False
    assert told(board, bool) == [ready(link.name, 1)]
    assert not link.is_cut
    link.close()


def test_a_replica_whose_board_is_gone_knows_that_by_its_lease() -> None:
    board = ReplicaBoard("127.0.0.1")
    quiet = BoardLink(board.address, board.secret, lease_s=0.5)
    busy = BoardLink(board.address, board.secret, lease_s=0.5)
    board.close()
    busy.post(ready("r1", 1))
    deadline_s = time.monotonic() + WAIT_S
    while not (quiet.is_cut and busy.is_cut):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    for link in (quiet, busy):
        link.post(ReplicaEnded(link.name))
        link.close()  # does not wait for what nobody will take
    with pytest.raises(ChannelClosed):
        BoardLink(board.address, board.secret)


def test_a_replica_that_is_not_heard_any_more_has_ended_and_does_not_come_back() -> None:
    board = ReplicaBoard("127.0.0.1", given_up_s=0.5)
    # A replica that was killed: it says no more.
    name = knock(board.address, board.secret, "name", b"", WAIT_S).decode()
    report = msgspec.msgpack.encode((name, 0, [encode_event(ready(name, 1))]))
    knock(board.address, board.secret, "report", report, WAIT_S)
    assert told(board, lambda events: len(events) >= 2) == [ready(name, 1), ReplicaEnded(name)]
    with pytest.raises(ChannelClosed, match=f"replica {name} was given up"):
        knock(board.address, board.secret, "report", msgspec.msgpack.encode((name, 1, [])), WAIT_S)
    time.sleep(0.6)
    assert board.take() == [], "it ended once"
    board.close()


def test_a_replica_that_said_that_it_ended_is_not_given_up_later() -> None:
    board = ReplicaBoard("127.0.0.1", given_up_s=0.5)
    link = BoardLink(board.address, board.secret)
    link.post(ReplicaEnded(link.name))
    link.close()
    time.sleep(0.6)
    assert board.take() == [ReplicaEnded(link.name)]
    board.close()
