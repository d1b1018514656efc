"""Nothing leaves the machine.

In a host whose default routes lead to a sink, first the sniffer proves on deliberate probes that it sees what leaves,
by every road that software takes: UDP, TCP, a name look-up, IPv6. Then the same host runs Ray as we start it, and
Remuda, from start to stop, and nothing arrives at the sink.

That silence is made, not natural: Ray as others start it asks 169.254.169.254 and a name server at every start of a
head (tests/hosts/README.md).
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hosts.sniffer import Packet, Sniffer
from tests.support.hosts.bed import NAME_SERVER
from tests.support.hosts.fixture import MakeBed
from tests.support.hosts.host import Host

pytestmark = pytest.mark.netns

ROOT = Path(__file__).parents[2]
OUTSIDE = "203.0.113.7"
OUTSIDE6 = "2001:db8::7"
PROBE_WAIT_S = 5.0

UDP = "import socket, sys; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'probe', (sys.argv[1], 9))"
TCP = "import socket, sys; socket.create_connection((sys.argv[1], 80), timeout=0.2)"
LOOK_UP = "import socket, sys; socket.getaddrinfo(sys.argv[1], 80)"
RAY = """
import ray
from cluster.control.ray_runtime import RayRuntime

@ray.remote(num_cpus=1)
class Adder:
    def add(self, left, right):
        return left + right

with RayRuntime.start_local(2) as runtime:
    assert ray.get(Adder.remote().add.remote(2, 3)) == 5
    print("served", flush=True)
"""

SERVE = """
import sys
from pathlib import Path
import httpx
from tests.support.served import Served

with Served(("--tp", "2", "--ep", "2", "--cpu-slots", "2"), Path(sys.argv[1])) as served:
    body = {"model": "remuda-tiny", "prompt": "Hello", "max_tokens": 4}
    answer = httpx.post(f"{served.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 4
    assert served.stop() == 0
    assert served.left_processes() == []
    print("served", flush=True)
"""


@pytest.fixture(scope="module")
def host_and_sink(make_bed: MakeBed) -> tuple[Host, Host]:
    bed = make_bed(1, with_sink=True)
    assert bed.sink is not None
    return bed.hosts[0], bed.sink


def environment() -> dict[str, str]:
    """Nothing in it that would keep a program from calling out, such as a proxy or the hub's offline switch."""
    quiet = {"HF_HUB_OFFLINE", "http_proxy", "https_proxy", "no_proxy"}
    kept = {name: value for name, value in os.environ.items() if name.lower() not in {*map(str.lower, quiet)}}
    return {**kept, "PYTHONPATH": str(ROOT)}


def wait_for(sniffer: Sniffer, wanted: Callable[[Packet], bool]) -> Packet:
    deadline = time.monotonic() + PROBE_WAIT_S
    while True:
        for packet in sniffer.packets:
            if wanted(packet):
                return packet
        assert time.monotonic() < deadline, f"the probe was not caught; caught: {[*map(str, sniffer.packets)]}"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("script", "target", "caught"),
    [
        (UDP, OUTSIDE, f"udp 10.77.0.1 → {OUTSIDE}:9"),
        (TCP, OUTSIDE, f"tcp 10.77.0.1 → {OUTSIDE}:80"),
        (LOOK_UP, "metadata.google.internal", f"udp 10.77.0.1 → {NAME_SERVER}:53 'metadata.google.internal'"),
        (UDP.replace("AF_INET", "AF_INET6"), OUTSIDE6, f"udp fd77::1 → {OUTSIDE6}:9"),
        (TCP, "169.254.169.254", "tcp 10.77.0.1 → 169.254.169.254:80"),
        (UDP, "224.0.0.251", "udp 10.77.0.1 → 224.0.0.251:9"),
    ],
    ids=["udp", "tcp", "dns", "ipv6", "cloud metadata", "multicast"],
)
def test_the_sniffer_catches_a_deliberate_probe(
    host_and_sink: tuple[Host, Host], script: str, target: str, caught: str
) -> None:
    host, sink = host_and_sink
    with Sniffer(sink) as sniffer:
        host.run([sys.executable, "-c", script, target], env=environment())
        wait_for(sniffer, lambda packet: str(packet) == caught)


@pytest.mark.parametrize("script", [RAY, SERVE], ids=["ray", "remuda serve"])
def test_nothing_is_sent_out(host_and_sink: tuple[Host, Host], script: str, tmp_path: Path) -> None:
    """From the start, over one piece of work, to the end."""
    host, sink = host_and_sink
    with Sniffer(sink) as sniffer:
        done = host.run([sys.executable, "-c", script, str(tmp_path / "log")], env=environment(), timeout_s=110)
        assert (done.returncode, done.stdout) == (0, "served\n"), done.stderr
        # The road to the sink still works: the silence before was not a cut cable.
        host.run([sys.executable, "-c", UDP, OUTSIDE], env=environment())
        last = wait_for(sniffer, lambda packet: packet.destination == OUTSIDE)
        assert [*map(str, sniffer.packets)] == [str(last)]
