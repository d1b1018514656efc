"""What the bed can do to its links, measured from inside the hosts."""

import json
import statistics
import sys
from pathlib import Path

import pytest

from tests.support.hosts import network
from tests.support.hosts.bed import Bed
from tests.support.hosts.fixture import MakeBed
from tests.support.hosts.host import Host

pytestmark = pytest.mark.netns

ECHO = """
import socket, threading
def serve(connection):
    with connection:
        while data := connection.recv(1 << 20):
            if data[:1] == b"e":
                connection.sendall(data)
            elif data[-1:] == b"!":
                connection.sendall(b"!")
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind(("0.0.0.0", 7000))
def mirror():
    while True:
        data, peer = udp.recvfrom(2048)
        udp.sendto(data, peer)
threading.Thread(target=mirror, daemon=True).start()
with socket.create_server(("0.0.0.0", 7000)) as server:
    print("listening", flush=True)
    while True:
        connection, _ = server.accept()
        threading.Thread(target=serve, args=(connection,), daemon=True).start()
"""
ROUND_TRIPS = """
import json, socket, sys, time
with socket.create_connection((sys.argv[1], 7000), timeout=5) as connection:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    took_s = []
    for _ in range(30):
        begun_s = time.monotonic()
        connection.sendall(b"e")
        connection.recv(1)
        took_s.append(time.monotonic() - begun_s)
print(json.dumps(took_s))
"""
BULK = """
import json, socket, sys, time
num_bytes = int(sys.argv[2])
with socket.create_connection((sys.argv[1], 7000), timeout=20) as connection:
    begun_s = time.monotonic()
    connection.sendall(bytes(num_bytes) + b"!")
    assert connection.recv(1) == b"!"
    print(json.dumps(num_bytes * 8 / 1e6 / (time.monotonic() - begun_s)))
"""
DATAGRAMS = """
import json, socket, sys
probe = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
probe.settimeout(0.1)
num_back, num_sent = 0, int(sys.argv[2])
for begun in range(0, num_sent, 100):
    for number in range(100):
        probe.sendto(b"%d" % (begun + number), (sys.argv[1], 7000))
    try:
        for _ in range(100):
            probe.recvfrom(64)
            num_back += 1
    except TimeoutError:
        pass
print(json.dumps(1 - num_back / num_sent))
"""


@pytest.fixture(scope="module")
def bed(make_bed: MakeBed) -> Bed:
    made = make_bed(3)
    for host in made.hosts:
        server = host.popen([sys.executable, "-c", ECHO])
        assert server.stdout is not None and server.stdout.readline() == "listening\n"
    return made


def measured(script: str, host: Host, other: Host, *arguments: str) -> object:
    done = host.run([sys.executable, "-c", script, other.address, *arguments])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def round_trip_ms(host: Host, other: Host) -> float:
    took_s = measured(ROUND_TRIPS, host, other)
    assert isinstance(took_s, list)
    return 1000 * statistics.median(took_s)


def bulk_mbit_per_s(host: Host, other: Host, num_bytes: int) -> float:
    rate = measured(BULK, host, other, str(num_bytes))
    assert isinstance(rate, float)
    return rate


def test_a_delayed_link_takes_so_long_each_way_and_keeps_its_bandwidth(bed: Bed) -> None:
    first, second, third = bed.hosts
    assert round_trip_ms(first, second) < 1
    bed.network.delay(second, 5)
    try:
        assert 10 <= round_trip_ms(first, second) < 12
        assert round_trip_ms(first, third) < 1
        # Far more than a window of one packet every 10 ms would give: checksums and segments pass the wire.
        assert bulk_mbit_per_s(first, second, 50_000_000) > 200
    finally:
        bed.network.delay(second, 0)
    assert round_trip_ms(first, second) < 1


def test_a_delay_that_cannot_be_leaves_the_link_as_it_was(
    bed: Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, _ = bed.hosts
    broken = tmp_path / "wire.py"
    broken.write_text("raise SystemExit('no such device')")
    bed.network.delay(second, 5)
    monkeypatch.setattr(network, "_WIRE", broken)
    for _ in range(2):  # in place of a wire, and where there is none
        with pytest.raises(RuntimeError, match="the wire of .* did not start"):
            bed.network.delay(second, 7)
        assert reaches(first, second)


def test_a_limited_link_carries_what_it_was_given_both_ways(bed: Bed) -> None:
    first, second, third = bed.hosts
    bed.network.limit(second, 40)
    try:
        assert 30 < bulk_mbit_per_s(first, second, 4_000_000) < 44
        assert 30 < bulk_mbit_per_s(second, first, 4_000_000) < 44
        assert bulk_mbit_per_s(first, third, 40_000_000) > 200
    finally:
        bed.network.limit(second, None)
    assert bulk_mbit_per_s(first, second, 40_000_000) > 200


def test_a_lossy_link_loses_its_share(bed: Bed) -> None:
    first, second, third = bed.hosts
    bed.network.lose(second, 0.05, [first])
    try:
        # There and back: 1 - 0.95². 2,000 datagrams: a standard deviation of 0.7 %.
        assert measured(DATAGRAMS, first, second, "2000") == pytest.approx(0.0975, abs=0.03)
        assert measured(DATAGRAMS, third, second, "200") == 0
    finally:
        bed.network.reunite()
    assert measured(DATAGRAMS, first, second, "200") == 0


def reaches(host: Host, other: Host) -> bool:
    """A datagram comes back."""
    return host.run([sys.executable, "-c", DATAGRAMS, other.address, "100"]).stdout.strip() != "1.0"


def test_a_partition_separates_silently_and_heals(bed: Bed) -> None:
    first, second, third = bed.hosts
    bed.network.partition([first, second], [third])
    try:
        assert reaches(first, second)
        assert not reaches(first, third)
        assert not reaches(third, second)
        assert "state UP" in third.run(["ip", "link", "show", "eth0"]).stdout
    finally:
        bed.network.reunite()
    assert reaches(first, third)
    assert reaches(third, second)


def test_a_silent_drop_works_one_way_and_behind_a_delay_too(bed: Bed) -> None:
    first, second, third = bed.hosts
    bed.network.delay(second, 1)
    bed.network.drop(first, second)
    try:
        assert not reaches(first, second)
        assert reaches(third, second)
    finally:
        bed.network.reunite()
        bed.network.delay(second, 0)
    assert reaches(first, second)


def test_a_cut_takes_the_carrier_and_only_that_host(bed: Bed) -> None:
    first, second, third = bed.hosts
    bed.network.cut(second)
    try:
        assert "NO-CARRIER" in second.run(["ip", "link", "show", "eth0"]).stdout
        assert not reaches(first, second)
        assert reaches(first, third)
    finally:
        bed.network.heal(second)
    assert reaches(first, second)


def test_mounts_and_variables_of_one_host_are_its_own(bed: Bed) -> None:
    first, second, _ = bed.hosts
    second.setup.append("mount -t tmpfs -o size=1m tmpfs /dev/shm && export PLANTED=yes")
    try:
        size = "import os; s = os.statvfs('/dev/shm'); print(s.f_blocks * s.f_frsize, os.environ.get('PLANTED'))"
        assert second.run([sys.executable, "-c", size]).stdout == f"{2**20} yes\n"
        assert first.run([sys.executable, "-c", size]).stdout != f"{2**20} yes\n"
    finally:
        second.setup.clear()
