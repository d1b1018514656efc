"""The doctor on a real Ray over three hosts, started as docs/several_hosts.md says, with faults in one of them; and
``remuda serve``, which refuses the faulty hosts by itself and serves from the good ones."""

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.doctor.examination import cells
from tests.doctor.test_planted_faults import other_version, small_shm
from tests.support.hosts.bed import Bed
from tests.support.hosts.fixture import MakeBed
from tests.support.hosts.host import Host

pytestmark = [pytest.mark.netns, pytest.mark.full, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
REMUDA = str(Path(sys.executable).parent / "remuda")
READY_TIMEOUT_S = 120.0


class ByTheBook:
    """A Ray over a bed's hosts that somebody starts by hand, host by host."""

    def __init__(self, bed: Bed, folder: Path) -> None:
        self.bed = bed
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment = {**kept, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        self.address = f"{bed.hosts[0].address}:6379"
        # Ray's socket paths are short or it does not start.
        self.directory = Path("/tmp") / f"rmd-{secrets.token_hex(4)}"

    def start(self, host: Host) -> None:
        """``ray start`` in our form, as the document has it."""
        role = [f"--address={self.address}"]
        if host is self.bed.hosts[0]:
            role = ["--head", "--port=6379", "--include-dashboard=False", f"--temp-dir={self.directory}"]
        command = [sys.executable, "-m", "cluster.control.ray_runtime", "start", *role]
        done = host.run(
            [*command, f"--node-ip-address={host.address}", "--num-cpus=2"],
            timeout_s=60,
            env={**self.environment, "PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def remuda(self, host: Host, *arguments: str, timeout_s: float = 120) -> "subprocess.CompletedProcess[str]":
        return host.run([REMUDA, *arguments], timeout_s=timeout_s, env=self.environment)

    def doctor(self, *arguments: str) -> tuple[int, dict[str, Any]]:
        done = self.remuda(self.bed.hosts[0], "doctor", *arguments, "--address", self.address, "--json")
        assert done.stdout, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return done.returncode, found


@pytest.fixture(scope="module")
def cluster(make_bed: MakeBed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ByTheBook]:
    folder = tmp_path_factory.mktemp("ray")
    bed = make_bed(3)
    small_shm(bed.hosts[2])
    other_version(bed.hosts[2], folder / "site")
    made = ByTheBook(bed, folder)
    for host in bed.hosts[:2]:
        made.start(host)
    yield made
    bed.close()
    shutil.rmtree(made.directory)


def test_a_good_cluster_is_well_and_has_our_settings(cluster: ByTheBook) -> None:
    status, found = cluster.doctor()
    assert (status, found["ok"]) == (0, True), cells(found, "fail")
    assert [host["address"] for host in found["hosts"]] == ["10.77.0.1", "10.77.0.2"]
    assert {host["chosen"]["GLOO_SOCKET_IFNAME"] for host in found["hosts"]} == {"eth0"}
    settings = [each for each in found["findings"] if each["check"] == "Ray's settings"]
    assert [each["value"] for each in settings] == ["notices silence in 4.5 s"] * 2
    (link,) = found["links"]
    assert link["transport"] == "gloo"
    assert link["error"] is None


def test_the_table_names_the_slow_link_and_the_status_is_1(cluster: ByTheBook) -> None:
    slow = cluster.bed.hosts[1]
    cluster.bed.network.limit(slow, 30)
    try:
        done = cluster.remuda(cluster.bed.hosts[0], "doctor", "--address", cluster.address)
    finally:
        cluster.bed.network.limit(slow, None)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"FAIL bandwidth of rank 0 → rank 1 \(10.77.0.1 → 10.77.0.2\): \d+ Mbit/s", done.stdout)


def test_ranks_over_the_good_hosts_answer(cluster: ByTheBook, tmp_path: Path) -> None:
    log = tmp_path / "serve.log"
    host = cluster.bed.hosts[1]
    # Two ranks on each host: a tensor-parallel group that crosses hosts.
    command = [REMUDA, "serve", "remuda-tiny", "--tp", "4", "--tp-across-hosts", "--address", cluster.address]
    with log.open("w") as output:
        server = host.popen(command, env=cluster.environment, stdout=output.fileno(), stderr=output.fileno())
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        while "ready in" not in log.read_text():
            assert server.poll() is None and time.monotonic() < deadline_s, log.read_text()
            time.sleep(0.1)
        question = ["chat", "My name is Zora. What is my name?", "--temperature", "0", "--max-tokens", "12"]
        answer = cluster.remuda(host, *question)
        assert "Zora" in answer.stdout, answer.stderr
        placed = json.loads(cluster.remuda(host, "status", "--json").stdout)["replicas"][0]["ranks"]
        assert len({rank["host"] for rank in placed}) == 2
        server.terminate()
        assert server.wait(60) == 0, log.read_text()


def test_a_faulty_host_that_joins_is_found_and_serve_refuses_it(cluster: ByTheBook) -> None:
    """The last test of the module: the host stays in the cluster."""
    faulty = cluster.bed.hosts[2]
    cluster.start(faulty)
    status, found = cluster.doctor()
    assert status == 1
    failed = {check for check, where in cells(found, "fail") if where == faulty.address}
    assert {"versions", "/dev/shm"} <= failed
    others = {where for _, where in cells(found, "fail")} - {faulty.address}
    assert not [where for where in others if "10.77.0.3" not in where]
    done = cluster.remuda(
        cluster.bed.hosts[0], "serve", "remuda-tiny", "--tp", "2", "--pp", "3", "--address", cluster.address
    )
    assert done.returncode == 1, done.stderr
    assert "versions of 10.77.0.3: safetensors 9.9.9" in done.stderr
