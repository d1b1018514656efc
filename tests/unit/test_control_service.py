"""A supervisor's view of Ray's control service: whether it answers, and calls that would wait for it for ever."""

import logging
import socket
import threading
import time

import pytest

from cluster.replica.control_service import ControlService, ControlServiceSilent


def test_a_call_that_waits_for_ever_is_given_up() -> None:
    control, never = ControlService("127.0.0.1:1"), threading.Event()
    began_s = time.monotonic()
    with pytest.raises(ControlServiceSilent, match="no process can be started"):
        control.ask(never.wait, timeout_s=0.1)
    assert time.monotonic() - began_s < 5.0
    never.set()


def test_what_a_call_returns_or_raises_is_passed_on() -> None:
    control = ControlService("127.0.0.1:1")
    assert control.ask(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        control.ask(lambda: 1 // 0)


def test_its_silence_is_told_once_and_so_is_its_return(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        control = ControlService(f"127.0.0.1:{port}")
        assert control.answers()
        control.look(10.0)
    assert not control.answers()
    with caplog.at_level(logging.WARNING):
        for now_s in (11.0, 20.0, 21.0, 30.0):
            control.look(now_s)
        with socket.create_server(("127.0.0.1", port)):
            control.look(40.0)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "Ray's control service at 127.0.0.1",
        "Ray's control service answers again",
    ]
