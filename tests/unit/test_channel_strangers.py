"""Peers of the step channel that are not what they say: turned away, or lost alone."""

import os
import socket
import threading
import uuid
from collections.abc import Callable

import pytest

from engine.errors import RankFailure
from engine.executor.channel import MAX_FRAME_BYTES, ChannelClosed
from engine.executor.frames import FrameKind, frame_head
from engine.executor.handshake import MAGIC, greet_leader, new_secret
from engine.executor.socket_hub import SocketHub
from engine.executor.socket_rank import SocketRankChannel
from engine.executor.sockets import connect

WAIT_S = 20.0


def unix_name() -> str:
    return f"unix:@remuda-test-{uuid.uuid4().hex}"


def _wait_for_end(link: socket.socket) -> None:
    try:
        while link.recv(1000):
            pass
    except ConnectionResetError:
        pass  # closed with bytes of ours unread


def strangers(address: str, secret: str) -> dict[str, Callable[[], None]]:
    def nonsense() -> None:
        with connect(address, WAIT_S) as link:
            link.sendall(os.urandom(200))
            _wait_for_end(link)

    def too_many_ranks() -> None:
        with connect(address, WAIT_S) as link:
            link.sendall(MAGIC + b"n" * 32 + b"\xff\xff")
            _wait_for_end(link)

    def refused(wrong_secret: str, rank: int) -> Callable[[], None]:
        def attempt() -> None:
            with pytest.raises(ChannelClosed, match="did not let"):
                SocketRankChannel(address, wrong_secret, [rank], WAIT_S)

        return attempt

    return {
        "nonsense": nonsense,
        "too many ranks": too_many_ranks,
        "wrong secret": refused(new_secret(), 1),
        "a rank of no gang": refused(secret, 7),
        "a rank that is there": refused(secret, 0),
        "hang-up": lambda: connect(address, WAIT_S).close(),
    }


@pytest.mark.parametrize("transport", ["unix", "tcp"])
@pytest.mark.parametrize("name", list(strangers("unix:@x", "")))
def test_strangers_are_turned_away_and_disturb_nobody(transport: str, name: str) -> None:
    secret = new_secret()
    hub = SocketHub([0, 1], secret, [unix_name() if transport == "unix" else "tcp:127.0.0.1:0"])
    first = SocketRankChannel(hub.addresses[0], secret, [0], WAIT_S)
    second = None
    try:
        strangers(hub.addresses[0], secret)[name]()
        second = SocketRankChannel(hub.addresses[0], secret, [1], WAIT_S)
        hub.send(b"plan")
        assert first.receive(WAIT_S) == second.receive(WAIT_S) == b"plan"
    finally:
        first.close()
        if second is not None:
            second.close()
        hub.close()


def test_a_rank_does_not_obey_a_leader_without_the_secret() -> None:
    """The impostor answers with a proof of its own making."""
    listener = socket.create_server(("127.0.0.1", 0))

    def pretend() -> None:
        link, _ = listener.accept()
        with link:
            link.sendall(MAGIC + b"n" * 32)
            link.recv(1000)
            link.sendall(b"p" * 32)

    thread = threading.Thread(target=pretend)
    thread.start()
    try:
        with pytest.raises(ChannelClosed, match="refused"):
            SocketRankChannel(f"tcp:127.0.0.1:{listener.getsockname()[1]}", new_secret(), [0], WAIT_S)
    finally:
        thread.join(WAIT_S)
        listener.close()


@pytest.mark.parametrize(
    "frame",
    [
        b"\xff" * 16,
        frame_head(FrameKind.MESSAGE, 4, rank=0) + b"mine",
        frame_head(FrameKind.IN_RING, 4, rank=1),
        b"\x01\x00\x01\x00" + (MAX_FRAME_BYTES + 1).to_bytes(4, "little") + b"\x00" * 8,
    ],
    ids=["nonsense", "another rank's name", "ring frame", "oversized"],
)
def test_a_rank_that_talks_nonsense_is_lost_alone(frame: bytes) -> None:
    secret = new_secret()
    hub = SocketHub([0, 1], secret, ["tcp:127.0.0.1:0"])
    good = SocketRankChannel(hub.addresses[0], secret, [0], WAIT_S)
    link = connect(hub.addresses[0], WAIT_S)
    try:
        assert greet_leader(link, secret, [1], WAIT_S) is None
        link.sendall(frame)
        with pytest.raises(RankFailure) as failure:
            hub.receive(WAIT_S)
        assert failure.value.rank == 1
        good.send(b"fine")
        assert hub.receive(WAIT_S) == (0, b"fine")
    finally:
        link.close()
        good.close()
        hub.close()
