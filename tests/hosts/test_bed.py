"""The bed itself: hosts reach each other and nothing else, cables can be pulled, and nothing stays behind."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.hosts.bed import Bed
from tests.support.hosts.fixture import MakeBed
from tests.support.hosts.host import NETWORK, Host
from tests.support.hosts.namespaces import PREFIX, SWEEPING, base_name, ip, namespaces, remove_namespaces

pytestmark = pytest.mark.netns

ROOT = Path(__file__).parents[2]
SERVER = """
import socket
with socket.create_server(("0.0.0.0", 7000)) as server:
    print("listening", flush=True)
    while True:
        connection, peer = server.accept()
        connection.sendall(peer[0].encode())
        connection.close()
"""
CLIENT = """
import socket, sys
print(socket.create_connection((sys.argv[1], 7000), timeout=float(sys.argv[2])).recv(100).decode())
"""

INTERFACE = """
import sys
from cluster.control.interfaces import local_interface_for
print(local_interface_for(sys.argv[1]))
"""
ABANDONED_BED = """
import time
from tests.support.hosts.bed import Bed
bed = Bed(1)
print(bed.hosts[0].name, flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def hosts(make_bed: MakeBed) -> Bed:
    made = make_bed(3)
    for host in made.hosts:
        server = host.popen([sys.executable, "-c", SERVER])
        assert server.stdout is not None and server.stdout.readline() == "listening\n"
    return made


def ask(host: Host, other: Host, timeout_s: float = 5.0) -> "subprocess.CompletedProcess[str]":
    """Connect from one host to the other's server, which answers with the address it sees."""
    return host.run([sys.executable, "-c", CLIENT, other.address, str(timeout_s)])


def test_every_host_reaches_every_other_under_its_own_address(hosts: Bed) -> None:
    for host in hosts.hosts:
        for other in hosts.hosts:
            answer = ask(host, other)
            assert answer.stdout.strip() == host.address, answer.stderr


def test_no_way_leads_out_of_the_bed(hosts: Bed) -> None:
    for host in hosts.hosts:
        assert "default" not in host.run(["ip", "route"]).stdout
    assert not any(NETWORK in line for line in ip("addr").splitlines()), "the bed's network is outside of it"


def test_a_pulled_cable_cuts_one_host_off_until_it_is_put_back(hosts: Bed) -> None:
    first, second, third = hosts.hosts
    hosts.network.cut(second)
    try:
        assert ask(first, second, timeout_s=0.5).returncode != 0
        assert ask(first, third).stdout.strip() == first.address
    finally:
        hosts.network.heal(second)
    assert ask(first, second).stdout.strip() == first.address


def test_local_interface_is_found_inside_a_host(hosts: Bed) -> None:
    host, other, _ = hosts.hosts
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert host.run([sys.executable, "-c", INTERFACE, host.address], env=env).stdout.strip() == "eth0"
    assert host.run([sys.executable, "-c", INTERFACE, "127.0.0.1"], env=env).stdout.strip() == "lo"
    refused = host.run([sys.executable, "-c", INTERFACE, other.address], env=env)
    assert f"no network interface of this host carries {other.address}" in refused.stderr


def test_closing_ends_what_ignores_sigterm_and_what_was_orphaned() -> None:
    stubborn = "import os, signal, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    orphan = f"{stubborn}if os.fork():\n    os._exit(0)\nprint(os.getpid(), flush=True)\ntime.sleep(600)"
    with Bed(1) as made:
        process = made.hosts[0].popen([sys.executable, "-c", orphan])
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert pid in made.hosts[0].pids()
    assert not Path("/proc", str(pid)).exists() or "zombie" in Path("/proc", str(pid), "status").read_text()
    assert not set(namespaces()) & {host.name for host in made.hosts}


def test_what_a_killed_process_left_is_swept_by_the_next_bed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", ABANDONED_BED], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        with SWEEPING:  # nobody else's bed may be the next one
            process.kill()
            process.wait()
            assert name in namespaces()
            with Bed(1):
                assert name not in namespaces()


def test_a_bed_of_a_living_process_is_left_alone(make_bed: MakeBed) -> None:
    other = make_bed(1)
    with Bed(1):
        assert other.hosts[0].name in namespaces()


def test_a_new_process_with_an_old_number_is_not_taken_for_the_old_one() -> None:
    name = f"{PREFIX}-{os.getpid()}.1-9-h1"
    with SWEEPING:
        ip("netns", "add", name)
        with Bed(1):
            assert name not in namespaces()


def test_two_may_remove_the_same_namespaces() -> None:
    base = f"{base_name(0)}.twice"
    names = [f"{base}-h{number}" for number in range(4)]
    for name in names:
        ip("netns", "add", name)
    with ThreadPoolExecutor(4) as pool:
        for removed in [pool.submit(remove_namespaces, base) for _ in range(4)]:
            removed.result()
    assert not set(names) & set(namespaces())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_hosts_by_hand_go_with_every_signal_that_ends_a_terminals_program(number: signal.Signals) -> None:
    command = [sys.executable, "-m", "tests.support.hosts.by_hand", "1"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:
        assert process.stdout is not None
        name = process.stdout.readline().split()[7]
        assert name in namespaces()
        process.send_signal(number)
        assert process.wait(20) == 0
    assert name not in namespaces()


def test_hosts_by_hand_obey_lines() -> None:
    command = [sys.executable, "-m", "tests.support.hosts.by_hand", "2"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:
        assert process.stdin is not None and process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]
        assert [line.split()[2] for line in lines] == ["10.77.0.1", "10.77.0.2"]
        names = {line.split()[7] for line in lines}
        assert names <= set(namespaces())
        for order, answer in (("delay 2 1", "done\n"), ("cut 3", "not done: there is no host 3\n")):
            process.stdin.write(f"{order}\n")
            process.stdin.flush()
            told = process.stdout.readline()
            while "done" not in told:
                told = process.stdout.readline()
            assert told == answer
        process.stdin.close()
        assert process.wait(20) == 0
    assert not names & set(namespaces())
