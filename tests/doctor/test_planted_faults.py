"""Faults planted in hosts and links of namespaces, and the doctor's finding of each: real tmpfs, a real clock that is
wrong (libfaketime), a real token bucket, real loss."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from cluster.config import load_serve_config
from cluster.control.preflight import preflight
from cluster.doctor.ask_hosts import ask_clocks, ask_hosts
from cluster.doctor.facts import Clock, HostFacts
from cluster.doctor.finding import Finding, Level
from cluster.doctor.quick import check_facts, examine_quickly
from cluster.errors import StartFailed
from cluster.replica.events import MemoryPlanned, ReplicaPlan
from cluster.replica.model_source import ModelSource
from tests.doctor.examination import cells, examine_bed
from tests.support.hosts.bed import Bed
from tests.support.hosts.calls import NamespaceCalls
from tests.support.hosts.fixture import MakeBed
from tests.support.hosts.host import Host

pytestmark = pytest.mark.netns

WELL, MISTIMED, CRAMPED, BARE = range(4)


def faketime_library() -> str | None:
    """None where the Debian package faketime is not installed, or the system is no Debian."""
    if shutil.which("dpkg") is None:
        return None
    found = subprocess.run(["dpkg", "-L", "libfaketime"], capture_output=True, text=True, check=False)
    return next((line for line in found.stdout.splitlines() if line.endswith("libfaketimeMT.so.1")), None)


def wrong_clock(host: Host, seconds: int, library: str) -> None:
    """The clock of every process in the host is ahead. Timers go by the monotonic clock, which stays right."""
    host.setup.append(f"export LD_PRELOAD={library} FAKETIME=+{seconds} DONT_FAKE_MONOTONIC=1")


def other_version(host: Host, folder: Path) -> None:
    """What a host with another safetensors says of itself."""
    metadata = folder / "safetensors-9.9.9.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: safetensors\nVersion: 9.9.9\n")
    host.setup.append(f"export PYTHONPATH={folder}")


def small_shm(host: Host) -> None:
    host.setup.append("mount -t tmpfs -o size=4m tmpfs /dev/shm")


def full_disk(host: Host, folder: Path) -> None:
    folder.mkdir()
    host.setup.append(f"mount -t tmpfs -o size=1m tmpfs {folder} && export TMPDIR={folder}")
    host.setup.append(f"head -c 2000000 /dev/zero >{folder}/fill 2>/dev/null || true")


class Found:
    """What the doctor found in a cluster of four, three of them with faults."""

    def __init__(self, bed: Bed, plan: ReplicaPlan) -> None:
        self.calls = NamespaceCalls(bed.hosts, slots=1)
        self.plan = plan
        nodes = self.calls.nodes()
        facts, self.failures = ask_hosts(self.calls, nodes, model=plan.model, revision=None, reads_disk=False)
        self.facts: list[HostFacts] = facts
        self.clocks: Mapping[str, Clock] = ask_clocks(self.calls, nodes[: MISTIMED + 1])
        findings = check_facts(facts, self.clocks, plan, [nodes], {})
        self.cells = {(each.check, each.where): each for each in findings}
        self.addresses = [host.address for host in bed.hosts]

    def bad(self, check: str) -> dict[str, Finding]:
        """By address: what is not well."""
        return {where: each for (name, where), each in self.cells.items() if name == check and each.level != Level.OK}


@pytest.fixture(scope="module")
def found(make_bed: MakeBed, tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("faults")
    model = folder / "model"
    shutil.copytree(ModelSource("remuda-tiny").directory(), model)
    bed = make_bed(4)
    if (library := faketime_library()) is not None:
        wrong_clock(bed.hosts[MISTIMED], 30, library)
    other_version(bed.hosts[MISTIMED], folder / "site")
    small_shm(bed.hosts[CRAMPED])
    full_disk(bed.hosts[CRAMPED], folder / "disk")
    bed.hosts[BARE].setup.append(f"mount -t tmpfs tmpfs {model} && ulimit -n 256")
    return Found(bed, preflight(load_serve_config({"model": str(model)})).launch.replica)


def test_every_host_answered_and_the_well_one_is_well(found: Found) -> None:
    assert found.failures == []
    well = [each for (check, where), each in found.cells.items() if where == found.addresses[WELL]]
    # Not started by Ray, so without its settings.
    assert {each.check for each in well if each.level is not Level.OK} == {"Ray's settings"}
    assert len(well) >= 10


def test_a_wrong_version_is_caught(found: Found) -> None:
    ((where, bad),) = found.bad("versions").items()
    assert (where, bad.level) == (found.addresses[MISTIMED], Level.FAIL)
    assert (bad.value, bad.limit.split()[1]) == ("safetensors 9.9.9", "safetensors")


def test_a_library_that_is_not_there_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The other faults are planted without it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert faketime_library() is None


@pytest.mark.skipif(faketime_library() is None, reason="needs the Debian package faketime")
def test_a_skewed_clock_is_caught(found: Found) -> None:
    ((where, bad),) = found.bad("clock").items()
    assert (where, bad.level) == (found.addresses[MISTIMED], Level.FAIL)
    assert found.clocks[where].offset_s == pytest.approx(30, abs=found.clocks[where].uncertainty_s + 0.01)


def test_a_small_shm_is_caught(found: Found) -> None:
    ((where, bad),) = found.bad("/dev/shm").items()
    assert (where, bad.level, bad.value) == (found.addresses[CRAMPED], Level.FAIL, "4 MiB free")


def test_a_full_disk_is_caught(found: Found) -> None:
    ((where, bad),) = found.bad("disk for temporary files").items()
    assert (where, bad.level) == (found.addresses[CRAMPED], Level.FAIL)
    assert bad.value.startswith("0 MiB free")


def test_a_missing_checkpoint_and_few_open_files_are_caught(found: Found) -> None:
    for check in ("checkpoint", "open files"):
        ((where, bad),) = found.bad(check).items()
        assert (where, bad.level) == (found.addresses[BARE], Level.FAIL)


def test_serve_refuses_such_hosts_and_names_every_fault(found: Found) -> None:
    gang = [found.calls.nodes()[number] for number in (CRAMPED, BARE)]
    with pytest.raises(StartFailed) as caught:
        examine_quickly(found.calls, found.plan, [gang], MemoryPlanned([0, 0], None))
    for words in ("/dev/shm of 10.77.0.3", "temporary files of 10.77.0.3", "checkpoint of 10.77.0.4"):
        assert words in str(caught.value)


@pytest.mark.full
@pytest.mark.timeout(240)
def test_slow_lossy_and_separated_links_are_caught(make_bed: MakeBed) -> None:
    """Between four hosts: host 2 has little bandwidth, host 3 loses what it exchanges with host 1, and hosts 3 and 4 do
    not reach each other. Links that have no fault are well."""
    bed = make_bed(4)
    first, second, third, fourth = bed.hosts
    bed.network.limit(second, 30)
    bed.network.lose(third, 0.03, [first])
    bed.network.partition([third], [fourth])
    failed = cells(examine_bed(bed), "fail")
    places = {
        (a, b): f"rank {a} → rank {b} (10.77.0.{a + 1} → 10.77.0.{b + 1})" for a in range(4) for b in range(a + 1, 4)
    }
    assert {where for check, where in failed if check == "bandwidth"} >= {places[0, 1], places[1, 2], places[1, 3]}
    assert {where for check, where in failed if check == "loss"} == {places[0, 2]}
    assert {where for check, where in failed if check == "link"} == {places[2, 3]}
    assert not [where for _, where in failed if where == places[0, 3]]
    assert "Mbit/s" in failed["bandwidth", places[0, 1]]["value"]
    assert "firewall" in failed["link", places[2, 3]]["remedy"]


@pytest.mark.full
@pytest.mark.timeout(240)
def test_a_host_that_does_not_reach_the_one_that_asks_leaves_the_others_measured(make_bed: MakeBed) -> None:
    bed = make_bed(3)
    bed.network.partition([bed.hosts[0]], [bed.hosts[2]])
    found = examine_bed(bed)
    reached = {(link["first"], link["second"]): link["error"] is None for link in found["links"]}
    assert reached == {(0, 1): True, (0, 2): False, (1, 2): False}
    assert [rank["rank"] for rank in found["ranks"]] == [0, 1]
    assert {where for check, where in cells(found, "fail") if check == "link"} == {
        "rank 0 → rank 2 (10.77.0.1 → 10.77.0.3)",
        "rank 1 → rank 2 (10.77.0.2 → 10.77.0.3)",
    }


def test_tensor_parallelism_over_a_link_of_5_ms_is_warned_about_with_the_loss(make_bed: MakeBed) -> None:
    bed = make_bed(2)
    bed.network.delay(bed.hosts[1], 5)
    found = examine_bed(bed, "remuda-tiny", "tensor_parallel_size", "2", "tp_across_hosts", "true")
    (link,) = found["links"]
    assert 0.010 <= link["channel_s"] < 0.013
    assert 0.005 <= link["collective_s"] < 0.030
    warned = cells(found, "warn")
    loss = warned["tensor parallelism over", "rank 0 → rank 1 (10.77.0.1 → 10.77.0.2)"]
    assert "of a decode step would be lost" in loss["value"]
    assert int(loss["value"].partition("%")[0]) > 90
    assert "--pp across hosts" in loss["remedy"]
    assert cells(found, "fail") == {}, os.linesep.join(map(str, found["findings"]))
