"""A gang that lost a rank forms anew: only that rank is replaced, the others keep their process and their weights, and
every request goes on with the tokens that it would have had."""

import os
import signal
import subprocess
import time
from typing import Any

import msgspec
import psutil
import pytest

from engine.errors import RankFailure
from engine.executor.gang_start import StartMessage
from engine.executor.process_gang import END_TIMEOUT_S, ProcessGang
from engine.executor.rank_message import decode_message
from engine.executor.socket_hub import SocketHub
from engine.executor.worker_config import WorkerConfig
from engine.messages import Hello
from engine.request import Output, Request
from tests.parity.reference import Reference
from tests.support.gang_engine import ForkedGangEngine, gang_config, gang_engine, make_request, tokens_of

pytestmark = pytest.mark.timeout(120)

MOST_TO_BE_FREE_S = 1.0


def requests_of(reference: Reference) -> list[Request]:
    """Greedy and seeded ones."""
    greedy = [make_request(f"greedy-{i}", prompt) for i, prompt in enumerate(reference.prompts)]
    drawn = [
        make_request(f"drawn-{i}", prompt, temperature=1.0, seed=i, repetition_penalty=1.1)
        for i, prompt in enumerate(reference.prompts)
    ]
    return greedy + drawn


@pytest.mark.parametrize(
    ("name", "layout", "faults"),
    [
        pytest.param("dense", {"tp": 2, "max_num_batched_tokens": 16}, {2: 1, 9: 0}, id="tp2-prefill-then-decode"),
        pytest.param("mixture", {"pp": 2, "tp": 2, "ep": 2, "depth": 3}, {6: 3}, id="pp2-tp2-ep2"),
        pytest.param("mixture", {"dp": 2, "ep": 2}, {6: 1}, id="dp2-ep2"),
    ],
)
def test_streams_go_on_with_the_same_tokens(
    request: pytest.FixtureRequest, name: str, layout: dict[str, Any], faults: dict[int, int]
) -> None:
    reference: Reference = request.getfixturevalue(name)
    requests = requests_of(reference)
    with gang_engine(reference, **layout) as served:
        unfaulted = {name: tokens_of(outputs) for name, outputs in served.run(requests).items()}
        first = [process.pid for process in served.gang.processes]
        assert served.run_with_kills(requests, faults) == unfaulted
        assert served.epoch == len(faults)
        last = [process.pid for process in served.gang.processes]
    kept = set(range(len(first))) - set(faults.values())
    assert {rank for rank in range(len(first)) if first[rank] == last[rank]} == kept
    for i, (prompt, generated) in enumerate(zip(reference.prompts, reference.generated, strict=True)):
        assert unfaulted[f"greedy-{i}"] == generated.token_ids[len(prompt) :]


def test_a_survivor_reads_its_weights_no_second_time(dense: Reference) -> None:
    requests = requests_of(dense)
    with gang_engine(dense, tp=2) as served:
        unfaulted = {name: tokens_of(outputs) for name, outputs in served.run(requests).items()}
        for found in requests:
            served.engine.add(found)
        outputs: dict[str, list[Output]] = {found.request_id: [] for found in requests}
        for _ in range(4):
            for output in served.engine.step():
                outputs[output.request_id].append(output)
        served.gang.processes[1].kill()
        served.gang.processes[1].wait()  # what is told to form anew must not be dying still
        survivor = psutil.Process(served.gang.processes[0].pid)
        read_before = survivor.io_counters().read_chars
        served.reform()
        assert survivor.pid == served.gang.processes[0].pid
        while served.engine.has_work:
            for output in served.engine.step():
                outputs[output.request_id].append(output)
        assert survivor.io_counters().read_chars - read_before < 2**20
    assert {name: tokens_of(found) for name, found in outputs.items()} == unfaulted


def test_survivors_leave_a_collective_that_a_stopped_rank_never_reaches(dense: Reference) -> None:
    """A stopped process closes no connection. Freed survivors say hello to the next leader, long before any timeout."""
    with gang_engine(dense, tp=2, collective_timeout_s=60.0) as served:
        served.engine.add(make_request("one", dense.prompts[0], max_tokens=60))
        served.engine.step()
        victim = served.gang.processes[1]
        os.kill(victim.pid, signal.SIGSTOP)
        hellos: dict[int, float] = {}
        time.sleep(0.2)  # rank 0 is in the collective by now
        began = time.monotonic()
        served.gang.disband()
        hub = SocketHub([0], "secret", [f"unix:@remuda-test-{os.getpid()}"])
        try:
            config = worker_config_of(served, hub.addresses[0])
            stdin = served.gang.processes[0].stdin
            assert stdin is not None
            stdin.write(config.encode() + b"\n")
            stdin.flush()
            rank, data = hub.receive(5.0)
            hellos[rank] = time.monotonic() - began
            assert isinstance(decode_message(data, rank), Hello)
        finally:
            hub.close()
            victim.kill()
    assert hellos[0] < MOST_TO_BE_FREE_S


def worker_config_of(served: ForkedGangEngine, address: str) -> WorkerConfig:
    return msgspec.structs.replace(served.gang.config, rank=0, epoch=9, channel_address=address, secret="secret")


def test_a_rank_that_is_stopped_while_it_starts_is_named(dense: Reference) -> None:
    """Its peer waits for it, and nobody knows how long a start may take."""
    stopped_s: list[float] = []

    def stop(message: StartMessage) -> None:
        if isinstance(message, Hello) and message.rank == 1:
            os.kill(message.pid, signal.SIGSTOP)
            stopped_s.append(time.monotonic())

    with pytest.raises(RankFailure, match="rank 1 does not go on with its start: its process is stopped") as raised:
        ProcessGang(gang_config(dense, tp=2), on_message=stop)
    assert raised.value.rank == 1
    assert time.monotonic() - stopped_s[0] < END_TIMEOUT_S + 6.0


def test_a_process_that_ends_before_it_connects_is_named(dense: Reference) -> None:
    """Like one that is told to form anew while it dies."""
    dying = subprocess.Popen(["sleep", "0.2"], stdin=subprocess.PIPE)
    began_s = time.monotonic()
    with pytest.raises(RankFailure, match="rank 1 ended with status 0 before it was ready") as raised:
        ProcessGang(gang_config(dense, tp=2), processes={1: dying})
    assert raised.value.rank == 1 and time.monotonic() - began_s < END_TIMEOUT_S + 6.0
