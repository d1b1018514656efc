"""The real scheduler, engine loop, leader's server, router, journal and recovery in a simulated deployment with faults.

`make simulate SEEDS=2000` runs more of the same; a seed that fails there fails the same way every time.
"""

import os
import subprocess
import sys
from typing import Any

import pytest

from cluster.frontend.journal import Journal
from cluster.replica.recovery import Action, Recovery
from cluster.simulate.draw import draw_record
from cluster.simulate.explore import Case
from cluster.simulate.faults import Fault, FaultKind, Scenario, draw_scenario
from cluster.simulate.runs import all_cases, run_case, run_seed
from cluster.simulate.virtual_loop import run
from cluster.simulate.vocabulary import STRUCTURES
from cluster.simulate.world import World
from engine.executor.grammar_masks import GrammarMasks
from engine.request import Request
from engine.scheduler.block_pool import BlockPool
from engine.scheduler.break_trials import BreakTrials

NUM_SEEDS = 60


@pytest.mark.parametrize("first", range(0, NUM_SEEDS, 20))
def test_every_promise_holds_under_the_faults_of_many_seeds(first: int) -> None:
    for seed in range(first, first + 20):
        outcome = run_seed(seed)
        assert not outcome.error, f"python -m cluster.simulate --seed {seed}\n{outcome.error}"
        assert outcome.num_messages > 0


@pytest.mark.parametrize("seed", [644, 1108, 1522, 1709, 1803, 2804, 3155])
def test_promises_that_were_broken_once(seed: int) -> None:
    """A leader lost while its engine was trying requests; a client that came back for a stream that had moved, or to a
    front end that had not reached its leader yet; a request's choices that all break their gang, and nobody left who
    stops the others; the same twice over, with no other request beside them; a request of which only the leader of its
    first choice knew what it was, and had not heard of it when its front end died."""
    assert not (outcome := run_seed(seed)).error, outcome.error


def test_a_new_leader_goes_on_in_the_epoch_of_its_gang(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons: list[str] = []
    broke = Recovery.gang_broke

    def noted(self: Recovery, epoch: int, culprit: int | None, reason: str, now_s: float) -> list[Action]:
        reasons.append(reason)
        return broke(self, epoch, culprit, reason, now_s)

    monkeypatch.setattr(Recovery, "gang_broke", noted)
    seeds = [
        seed for seed in range(60) if FaultKind.LEADER_DIES in {each.kind for each in draw_scenario(seed, 2, 2).faults}
    ]
    for seed in seeds[:8]:
        assert not run_seed(seed).error
    assert seeds and not [reason for reason in reasons if "of epoch" in reason]


@pytest.mark.parametrize(("duration_s", "life"), [(5.0, 0), (25.0, 1)])
def test_a_leader_that_hangs_is_replaced_after_its_time_and_not_before(duration_s: float, life: int) -> None:
    hang = Fault(at_s=1.0, kind=FaultKind.LEADER_HANGS, replica=0, front_end=0, duration_s=duration_s)
    worlds: list[World] = []

    async def play() -> None:
        worlds.append(World(Scenario(3, 6, 50, spread_s=2.0, faults=(hang,))))
        await worlds[0].run()

    run(play)
    assert [replica.recovery.leader_life for replica in worlds[0].replicas] == [life, 0]
    assert worlds[0].ended_s > 5.0


def test_the_seeds_draw_every_kind_of_fault() -> None:
    drawn = {fault.kind for seed in range(NUM_SEEDS) for fault in draw_scenario(seed, 2, 2).faults}
    assert drawn == set(FaultKind)
    assert sum(draw_scenario(seed, 2, 2).has_poison for seed in range(NUM_SEEDS)) > 10


def test_the_seeds_draw_every_grammar() -> None:
    drawn = {
        request.sampling.grammar
        for seed in range(5)
        for number in range(10)
        for request in draw_record(draw_scenario(seed, 2, 2), number).requests
    }
    assert drawn == {None, *(structure.grammar for structure in STRUCTURES)}


def test_a_seed_runs_the_same_in_another_process() -> None:
    command = [sys.executable, "-m", "cluster.simulate", "--seed", "440"]
    answers = {
        subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=environment).stdout
        for environment in (os.environ | {"PYTHONHASHSEED": seed} for seed in "123")
    }
    assert len(answers) == 1 and "digest" in answers.pop()


def test_single_faults_at_some_messages_and_steps() -> None:
    """Every sixth of what `python -m cluster.simulate --explore` runs."""
    tried = all_cases()[::6]
    assert len(tried) > 100
    for case in tried:
        outcome = run_case(case)
        assert not outcome.error, f"{case}\n{outcome.error}"


def _fails_somewhere(seeds: range) -> bool:
    return any(run_seed(seed).error for seed in seeds)


def test_a_journal_that_forgets_tokens_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    resumed = Journal._resumed

    def forgetful(self: Journal) -> Request:
        request = resumed(self)
        return Request(
            request.request_id,
            request.token_ids[: request.num_prompt_tokens],
            request.num_prompt_tokens,
            request.sampling,
        )

    monkeypatch.setattr(Journal, "_resumed", forgetful)
    assert _fails_somewhere(range(20))


def test_a_grammar_that_is_not_advanced_over_what_was_generated_before_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    feed = GrammarMasks._feed

    def forgetful(self: GrammarMasks, entry: Any, generated: list[int]) -> None:
        feed(self, entry, generated if entry.matcher is not None else [])

    monkeypatch.setattr(GrammarMasks, "_feed", forgetful)
    assert _fails_somewhere(range(20))


def test_an_engine_that_does_not_find_the_request_that_breaks_it_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BreakTrials, "broke", lambda *arguments: None)
    assert _fails_somewhere(range(20))


def test_a_supervisor_that_replaces_nobody_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recovery, "rank_ended", lambda *arguments: [])
    monkeypatch.setattr(Recovery, "gang_broke", lambda *arguments: [])
    assert run_case(Case("step", 2, "rank 1 dies")).error


def test_a_block_that_is_given_away_too_early_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    release = BlockPool.release

    def twice(self: BlockPool, block_ids: list[int], last_step: int) -> None:
        release(self, block_ids, last_step)
        if len(block_ids) > 2:
            self._free.append(block_ids[0])

    monkeypatch.setattr(BlockPool, "release", twice)
    assert _fails_somewhere(range(5))
