"""A real leader, in a process of its own and without ranks, whose supervisor waits for a host. Ray's reference of its
side door, which would need a cluster, is the address itself."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from cluster.replica import host_wait, leader_handle
from cluster.replica.events import DrainBegun, Failed, decode_event
from cluster.replica.leader import LeaderConfig
from cluster.replica.leader_handle import LeaderHandle
from cluster.replica.placed_rank import PlacedRank
from cluster.replica.recovery import StartRank
from cluster.replica.supervisor import Supervisor
from engine.executor.handshake import new_secret
from tests.support.hosted_gang import small_plan

PATIENCE_S = 3.0
SECRET = new_secret()
PLAN = small_plan("remuda-tiny", host_wait_s=600.0)
PROCESS = """
import sys
from cluster.replica import gang
from cluster.replica.actor import LeaderProcess
gang.PATIENCE_S = float(sys.argv[3])
leader = LeaderProcess(sys.argv[1].encode(), "tcp:127.0.0.1:0", sys.argv[2])
print(leader.door(), flush=True)
while True:
    sys.stdout.write(leader.poll(1.0).decode())
    sys.stdout.flush()
"""


@pytest.fixture
def process() -> Iterator["subprocess.Popen[str]"]:
    config = LeaderConfig("r0", PLAN, "127.0.0.1", ["127.0.0.1"], "").encode().decode()
    command = [sys.executable, "-c", PROCESS, config, SECRET, str(PATIENCE_S)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as started:
        yield started
        started.kill()


@pytest.mark.timeout(120)
def test_a_leader_waits_as_long_as_its_supervisor_does(
    process: "subprocess.Popen[str]", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leader_handle, "ray", SimpleNamespace(get=lambda reference, timeout: reference))
    monkeypatch.setattr(host_wait, "STAY_INTERVAL_S", PATIENCE_S / 10)
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    door, poll = SimpleNamespace(remote=lambda: address), SimpleNamespace(remote=lambda wait_s: b"")
    supervisor = Supervisor("r0", PLAN, [PlacedRank(0, "127.0.0.1")], "127.0.0.1", "", lambda lost, living: {})
    leader = supervisor._leader = LeaderHandle(SimpleNamespace(door=door, poll=poll), SECRET)
    supervisor._places = SimpleNamespace(find_room=lambda rank: False, why_not="")  # type: ignore[assignment]
    told: list[str] = []
    reader = threading.Thread(target=lambda: told.extend(process.stdout or ()), daemon=True)
    reader.start()
    leader.begin()
    end_s = time.monotonic() + 2 * PATIENCE_S
    while time.monotonic() < end_s:
        assert supervisor._waits_for_host(StartRank(0, 1))
        time.sleep(PATIENCE_S / 20)  # as a supervisor looks now and then
    assert told == []
    while not told:  # nobody tells it any more
        assert process.poll() is None
        time.sleep(0.05)
    event = decode_event(told[0].encode())
    assert isinstance(event, Failed) and "nobody repaired it for 3 s" in event.message


def test_a_leader_that_takes_the_place_of_a_draining_one_is_told_so() -> None:
    configs: list[LeaderConfig] = []

    def new_leader(config: bytes) -> SimpleNamespace:
        configs.append(LeaderConfig.decode(config))
        nothing = SimpleNamespace(remote=lambda *arguments: None)
        return SimpleNamespace(door=nothing, poll=nothing)

    supervisor = Supervisor("r0", PLAN, [PlacedRank(0, "127.0.0.1")], "127.0.0.1", "", lambda lost, living: {})
    places = SimpleNamespace(move=lambda rank: None, hosts=["127.0.0.1"], new_leader=new_leader)
    supervisor._places = places  # type: ignore[assignment]
    supervisor._start_leader()
    supervisor._note(DrainBegun("r0"))
    supervisor._start_leader()
    assert [config.is_draining for config in configs] == [False, True]
