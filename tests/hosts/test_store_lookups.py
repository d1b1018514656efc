"""torch's store asks no name server when a gang opens it, and name look-ups elsewhere in the process still do."""

import os
import sys
from pathlib import Path

import pytest

from tests.hosts.sniffer import Sniffer
from tests.support.hosts.bed import NAME_SERVER
from tests.support.hosts.fixture import MakeBed
from tests.support.hosts.host import Host

pytestmark = pytest.mark.netns

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
def host_and_sink(make_bed: MakeBed) -> tuple[Host, Host]:
    bed = make_bed(1, with_sink=True)
    assert bed.sink is not None
    return bed.hosts[0], bed.sink


def seen_while(host_and_sink: tuple[Host, Host], script: str, output: str) -> set[str]:
    host, sink = host_and_sink
    with Sniffer(sink) as sniffer:
        done = host.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout_s=60)
        assert (done.returncode, done.stdout) == (0, output), done.stderr
        return {*map(str, sniffer.packets)}


def test_torchs_own_store_asks_for_the_name_of_loopback(host_and_sink: tuple[Host, Host]) -> None:
    """The reason for engine/parallel/store.py. When this fails, torch has stopped, and that module may go."""
    asked = f"udp 10.77.0.1 → {NAME_SERVER}:53 '1.0.0.127.in-addr.arpa'"
    assert seen_while(host_and_sink, PLAIN, "") == {asked}


def test_ours_asks_nobody(host_and_sink: tuple[Host, Host]) -> None:
    assert seen_while(host_and_sink, OURS, "value\n") == set()


def test_look_ups_work_again_afterwards(host_and_sink: tuple[Host, Host]) -> None:
    asked = f"udp 10.77.0.1 → {NAME_SERVER}:53 'after.example'"
    assert seen_while(host_and_sink, OURS + AFTERWARDS, "value\nnot found\n") == {asked}
