"""Runs of the simulation, each in a virtual loop of its own, and what came of them."""

import traceback
from collections.abc import Callable
from dataclasses import dataclass

from cluster.simulate.explore import Case, cases, small_scenario, world_of
from cluster.simulate.faults import Scenario, draw_scenario
from cluster.simulate.virtual_loop import run
from cluster.simulate.world import NUM_FRONT_ENDS, NUM_REPLICAS, World


@dataclass(frozen=True)
class Outcome:
    """``digest``: of all that was sent, and when; the same whenever the same run is repeated. ``virtual_s``: how long
    it lasted by its own clock. ``error``: the promise that was broken, with its trace; empty where all held."""

    name: str
    digest: str
    num_messages: int
    num_tokens: int
    virtual_s: float
    error: str = ""


def run_seed(seed: int) -> Outcome:
    """One deployment with the faults that the seed draws."""
    return _outcome(f"seed {seed}", draw_scenario(seed, NUM_REPLICAS, NUM_FRONT_ENDS), World)


def all_cases() -> list[Case]:
    """Every single fault at every message and step that the small deployment has without faults."""
    worlds: list[World] = []

    async def play() -> None:
        worlds.append(World(small_scenario()))
        await worlds[0].run()

    run(play)
    return list(cases(worlds[0].network.num_messages, worlds[0].replicas[0].num_steps))


def run_case(case: Case) -> Outcome:
    """The small deployment with one fault at one message."""
    return _outcome(str(case), small_scenario(), lambda scenario: world_of(scenario, case))


def _outcome(name: str, scenario: Scenario, make: Callable[[Scenario], World]) -> Outcome:
    worlds: list[World] = []

    async def play() -> None:
        worlds.append(make(scenario))
        await worlds[0].run()

    error = ""
    try:
        run(play)
    except Exception:  # noqa: BLE001  (whatever it is, it is this run's finding)
        error = traceback.format_exc()
    if not worlds:
        return Outcome(name, "", 0, 0, 0.0, error)
    world = worlds[0]
    num_tokens = sum(len(token_ids) for record in world.records for token_ids in record.token_ids)
    return Outcome(name, world.network.digest, world.network.num_messages, num_tokens, world.ended_s, error)
