"""A hub's model that hosts do not have yet: the doctor says how much will be downloaded, and downloads nothing."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
from huggingface_hub import constants

from cluster.control.host_calls import HostAnswer, HostCall
from cluster.control.placement import HostInfo
from cluster.doctor.ask_hosts import ask_hosts
from cluster.doctor.check_hosts import check_checkpoints
from cluster.doctor.finding import Level
from tests.support.hub_server import COMMIT, HubServer

CONFIG, WEIGHTS = b'{"a": 1}', bytes(range(256)) * 4096
FILES = {"config.json": CONFIG, "model.safetensors": WEIGHTS, "pytorch_model.bin": b"a pickle"}
HAS_IT, HAS_NOTHING, HAS_A_PART, IS_OFFLINE = (f"10.0.0.{number}" for number in range(1, 5))
_DOWNLOAD = "from cluster.replica.model_source import resolve; print(resolve('team/pony', None).directory())"
_RUN = """
import sys
from cluster.control.host_calls import run_named
sys.stdout.buffer.write(run_named(sys.argv[1], sys.stdin.buffer.read()))
"""


class Environments:
    """Hosts that differ by their environment, by address: each call is a process."""

    host = HAS_IT

    def __init__(self, environments: Mapping[str, Mapping[str, str]]) -> None:
        self._environments = environments

    def nodes(self) -> list[HostInfo]:
        return [HostInfo(address, address, 1) for address in self._environments]

    def call(self, calls: Sequence[HostCall], timeout_s: float) -> list[HostAnswer]:
        with ThreadPoolExecutor(len(calls)) as pool:
            return list(pool.map(lambda call: self._call(call, timeout_s), calls))

    def _call(self, call: HostCall, timeout_s: float) -> HostAnswer:
        command = [sys.executable, "-c", _RUN, call.function]
        environment = self._environments[call.host.address]
        done = subprocess.run(
            command, input=call.argument, capture_output=True, env=environment, timeout=timeout_s, check=False
        )
        return HostAnswer(done.stdout) if done.returncode == 0 else HostAnswer(error=done.stderr.decode())


def environment(hub: HubServer, home: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    return {**kept, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1", **more}


@pytest.mark.timeout(180)
def test_what_hosts_lack_is_told_and_held_against_their_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, part, empty = tmp_path / "here", tmp_path / "part", tmp_path / "empty"
    with HubServer(FILES) as hub:
        subprocess.run([sys.executable, "-c", _DOWNLOAD], env=environment(hub, here), check=True, timeout=60)
        shutil.copytree(here, part, symlinks=True)
        (weights,) = part.rglob("model.safetensors")
        weights.unlink()
        calls = Environments(
            {
                HAS_IT: environment(hub, here),
                HAS_NOTHING: environment(hub, empty),
                HAS_A_PART: environment(hub, part),
                IS_OFFLINE: environment(hub, empty, HF_HUB_OFFLINE="1"),
            }
        )
        # As this process would have it, had it begun with HF_HOME.
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(here / "hub"))
        num_requests = len(hub.requests)
        facts, failures = ask_hosts(calls, calls.nodes(), model="team/pony", revision=COMMIT, reads_disk=True)
        assert failures == []
        assert len(hub.requests) == num_requests, "a host that is asked for facts downloads nothing"
    found = {finding.where: finding for finding in check_checkpoints(facts)}
    whole = len(CONFIG) + len(WEIGHTS)
    assert found[HAS_IT].level is Level.OK
    assert (found[HAS_NOTHING].level, found[HAS_NOTHING].value) == (Level.WARN, f"{whole:,} bytes will be downloaded")
    assert found[HAS_A_PART].value == f"{len(WEIGHTS):,} bytes will be downloaded"
    assert found[IS_OFFLINE].level is Level.FAIL and "HF_HUB_OFFLINE" in found[IS_OFFLINE].value
    assert [host.bytes_read_per_s is not None for host in facts] == [True, False, False, False]
    disks = [msgspec.structs.replace(disk, free_bytes=whole) for disk in facts[1].disks]
    (full,) = check_checkpoints([msgspec.structs.replace(facts[1], disks=tuple(disks))])
    assert full.level is Level.FAIL and "make room" in full.remedy
