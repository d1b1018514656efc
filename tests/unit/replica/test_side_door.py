"""Calls that reach an actor while its thread is in another one."""

import select
import socket
import threading
from collections.abc import Iterator

import pytest

from cluster.replica.side_door import SideDoor, knock
from engine.errors import ProtocolViolation
from engine.executor.channel import ChannelClosed
from engine.executor.handshake import greet_leader, new_secret
from engine.executor.sockets import connect

WAIT_S = 5.0
SECRET = new_secret()


def refuse(_: bytes) -> bytes:
    raise ProtocolViolation("epoch 3 comes after epoch 4")


@pytest.fixture(params=["unix", "tcp"])
def door(request: pytest.FixtureRequest) -> Iterator[SideDoor]:
    address = "tcp:127.0.0.1:0" if request.param == "tcp" else f"unix:@remuda-test-{new_secret()[:12]}"
    opened = SideDoor(address, SECRET, {"turn": lambda data: data[::-1], "refuse": refuse})
    yield opened
    opened.close()


def test_a_call_is_answered(door: SideDoor) -> None:
    long = bytes(range(256)) * 4096
    assert knock(door.address, SECRET, "turn", b"abc", WAIT_S) == b"cba"
    assert knock(door.address, SECRET, "turn", long, WAIT_S) == long[::-1]
    assert knock(door.address, SECRET, "turn", b"", WAIT_S) == b""


@pytest.mark.parametrize(("name", "reason"), [("refuse", "epoch 3 comes after epoch 4"), ("nothing", "KeyError")])
def test_the_caller_is_told_what_went_wrong(door: SideDoor, name: str, reason: str) -> None:
    with pytest.raises(ChannelClosed, match=reason):
        knock(door.address, SECRET, name, b"", WAIT_S)
    assert knock(door.address, SECRET, "turn", b"ab", WAIT_S) == b"ba"


def test_who_does_not_know_the_secret_calls_nothing(door: SideDoor) -> None:
    with pytest.raises(ChannelClosed):
        knock(door.address, new_secret(), "turn", b"abc", WAIT_S)


def test_a_slow_call_does_not_hold_up_others() -> None:
    begun, may_end = threading.Event(), threading.Event()

    def slow(data: bytes) -> bytes:
        begun.set()
        assert may_end.wait(WAIT_S)
        return data

    opened = SideDoor("tcp:127.0.0.1:0", SECRET, {"slow": slow, "quick": lambda data: data})
    answers: list[bytes] = []
    caller = threading.Thread(target=lambda: answers.append(knock(opened.address, SECRET, "slow", b"s", WAIT_S)))
    caller.start()
    try:
        assert begun.wait(WAIT_S)
        assert knock(opened.address, SECRET, "quick", b"q", WAIT_S) == b"q"
        assert not answers
    finally:
        may_end.set()
        caller.join(WAIT_S)
        opened.close()
    assert answers == [b"s"]


@pytest.mark.parametrize("message", [b"\xff\xff\xff\xff", b"\x04\x00\x00\x00\xc1\xc1\xc1\xc1", b"\x08\x00\x00\x00ab"])
def test_nonsense_ends_its_own_connection_only(door: SideDoor, message: bytes) -> None:
    with connect(door.address, WAIT_S) as link:
        greet_leader(link, SECRET, [0], WAIT_S)
        link.sendall(message)
        link.shutdown(socket.SHUT_WR)
        link.settimeout(WAIT_S)
        assert link.recv(1) == b""
    assert knock(door.address, SECRET, "turn", b"ab", WAIT_S) == b"ba"


def test_nobody_on_the_way_reads_what_is_said() -> None:
    told, answer = b"the gang's own secret", b"and what is said to it"
    opened = SideDoor("tcp:127.0.0.1:0", SECRET, {"form": lambda data: answer if data == told else b""})
    heard = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        relay = threading.Thread(target=_relay, args=(listener, opened.address, heard))
        relay.start()
        address = f"tcp:127.0.0.1:{listener.getsockname()[1]}"
        assert knock(address, SECRET, "form", told, WAIT_S) == answer
        relay.join(WAIT_S)
    opened.close()
    assert len(heard) > 300 and told not in heard and answer not in heard and SECRET.encode() not in heard


def _relay(listener: socket.socket, address: str, heard: bytearray) -> None:
    """One connection, both ways, until its caller has what it wanted."""
    caller, _ = listener.accept()
    with caller, connect(address, WAIT_S) as actor:
        while True:
            for link in select.select([caller, actor], [], [], WAIT_S)[0]:
                data = link.recv(1 << 16)
                heard += data
                if not data:
                    return
                (actor if link is caller else caller).sendall(data)


def test_nobody_behind_the_door_is_an_error() -> None:
    opened = SideDoor("tcp:127.0.0.1:0", SECRET, {})
    address = opened.address
    opened.close()
    opened._door._thread.join(WAIT_S)
    with pytest.raises(ChannelClosed, match="did not answer"):
        knock(address, SECRET, "turn", b"", WAIT_S)
