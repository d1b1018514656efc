"""torch's store asks no name server when a gang opens it, and name look-ups elsewhere in the process still do."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts import bed
from tests.hosts.bed import Bed, Host
from tests.hosts.sniffer import Sniffer

pytestmark = [pytest.mark.netns, pytest.mark.skipif(bed.why_not() is not None, reason=str(bed.why_not()))]

ROOT = Path(__file__).parents[2]
PLAIN = """
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
"""
OURS = """
from engine.parallel.store import connect_store, serve_store
store = serve_store("127.0.0.1", 10.0)
client = connect_store("127.0.0.1", store.port, 10.0)
client.set("key", "value")
print(store.get("key").decode())
"""
AFTERWARDS = """
import socket
try:
    socket.getaddrinfo("after.example", 80)
except socket.gaierror:
    print("not found")
"""


@pytest.fixture(scope="module")
def host_and_sink() -> Iterator[tuple[Host, Host]]:
    with Bed(1, with_sink=True) as made:
        assert made.sink is not None
        yield made.hosts[0], made.sink


def seen_while(host_and_sink: tuple[Host, Host], script: str, output: str) -> set[str]:
    host, sink = host_and_sink
    with Sniffer(sink) as sniffer:
        done = host.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout_s=60)
        assert (done.returncode, done.stdout) == (0, output), done.stderr
        return {*map(str, sniffer.packets)}


def test_torchs_own_store_asks_for_the_name_of_loopback(host_and_sink: tuple[Host, Host]) -> None:
    """The reason for engine/parallel/store.py. When this fails, torch has stopped, and that module may go."""
    asked = f"udp 10.77.0.1 → {bed.NAME_SERVER}:53 '1.0.0.127.in-addr.arpa'"
    assert seen_while(host_and_sink, PLAIN, "") == {asked}


def test_ours_asks_nobody(host_and_sink: tuple[Host, Host]) -> None:
    assert seen_while(host_and_sink, OURS, "value\n") == set()


def test_look_ups_work_again_afterwards(host_and_sink: tuple[Host, Host]) -> None:
    asked = f"udp 10.77.0.1 → {bed.NAME_SERVER}:53 'after.example'"
    assert seen_while(host_and_sink, OURS + AFTERWARDS, "value\nnot found\n") == {asked}
