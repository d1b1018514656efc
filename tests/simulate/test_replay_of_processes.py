"""What real ranks and a real leader have recorded replays, also from the middle."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from cluster.replica.recorded_engine import RecordedEngine
from cluster.simulate.recorded import Recorded
from cluster.simulate.replay import Replay
from engine.config import Dtype, ParallelConfig, SchedulerConfig
from engine.executor.flight_record import FlightRecord
from engine.executor.process_gang import ProcessGang
from engine.model_config import ModelConfig, kv_groups
from engine.scheduler.expert_balancer import ExpertBalancer
from engine.scheduler.expert_layout import expert_layout
from tests.parity.architectures import make_reference
from tests.support.gang_engine import gang_config, make_request
from tests.support.served import Served, run_remuda

pytestmark = pytest.mark.timeout(180)


def test_what_two_ranks_have_answered_replays_from_the_first_state_that_is_left(tmp_path: Path) -> None:
    reference = make_reference("llama4-scout", tmp_path)
    config = gang_config(reference, tp=2, ep=2, max_num_seqs=4, depth=2)
    record = FlightRecord(max_bytes=40_000)
    gang = ProcessGang(config, record=record)
    try:
        model = ModelConfig.from_directory(config.model)
        # Without --enable-eplb experts are only counted.
        layout = expert_layout(model, ParallelConfig(tp=2, ep=2), ["a", "a"], Dtype.FLOAT32)
        engine = RecordedEngine(
            record,
            executor=gang,
            kv_groups=kv_groups(model, config.pp),
            vocab_size=model.vocab_size,
            scheduler_config=SchedulerConfig(4, config.max_num_batched_tokens, gang.ready.max_model_len, depth=2),
            cache_config=gang.ready.cache,
            experts=ExpertBalancer(layout, time.monotonic),
        )
        for number in range(24):
            engine.add(make_request(f"q{number}", reference.prompts[number % len(reference.prompts)], seed=number))
        num_steps = 0
        while engine.has_work:
            engine.step()
            num_steps += 1
    finally:
        gang.close()
    recorded = Recorded(b"".join(record.lines()))
    assert recorded.begin is not None and recorded.begin[1].steps_in_flight and len(recorded.states) > 2
    replay = Replay(recorded)
    replay.run()
    assert num_steps / 4 < replay.num_steps < num_steps


@pytest.mark.full
def test_the_record_of_a_server_that_has_lost_its_beginning_replays(tmp_path: Path) -> None:
    """The log-probabilities of prompts fill it."""
    record = tmp_path / "record.jsonl"
    with Served(("remuda-tiny", "--tp", "2"), tmp_path / "log") as served, ThreadPoolExecutor(6) as clients:
        body = {"model": "remuda-tiny", "max_tokens": 40, "ignore_eos": True, "echo": True, "logprobs": 20, "n": 2}
        bodies = [body | {"prompt": f"{number} " + "Once upon a time " * 300} for number in range(60)]
        answers = clients.map(lambda body: httpx.post(f"{served.url}/v1/completions", json=body, timeout=60), bodies)
        assert {answer.status_code for answer in answers} == {200}
        assert run_remuda("status", "--target", served.target, "--dump", str(record)).returncode == 0
    head = json.loads(record.read_text().partition("\n")[0])
    assert head["num_lost"]
    replayed = run_remuda("replay", str(record))
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr
    print(replayed.stdout)
