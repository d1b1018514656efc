"""Every single fault at every message of one small deployment: two ranks, two requests."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cluster.simulate.faults import Scenario
from cluster.simulate.network import Connection, End
from cluster.simulate.world import World

LATE_S = 8.0
MESSAGE_FAULTS = (
    "sender dies",
    "receiver dies",
    "connection breaks",
    "arrives twice",
    "arrives late",
    "link is silent",
)
STEP_FAULTS = ("rank 0 dies", "rank 1 dies", "rank 1 stops", "all ranks die", "replica dies", "leader hangs")


@dataclass(frozen=True)
class Case:
    """``fault`` befalls the message, or the step of the first replica's gang, with this number, counted from the start
    of the run."""

    what: str
    number: int
    fault: str

    def __str__(self) -> str:
        return f"{self.what} {self.number}: {self.fault}"


def small_scenario() -> Scenario:
    """Two requests with two choices each, a few steps long, nearly at the same time: one with log-probabilities, one
    with a grammar and with a prompt of two chunks."""
    return Scenario(seed=23, num_clients=2, max_tokens=6, spread_s=0.05, faults=())


def cases(num_messages: int, num_steps: int) -> Iterator[Case]:
    """All of a run that has so many of both without faults."""
    for number in range(num_messages):
        for fault in MESSAGE_FAULTS:
            yield Case("message", number, fault)
    for number in range(num_steps):
        for fault in STEP_FAULTS:
            yield Case("step", number, fault)


def world_of(scenario: Scenario, case: Case) -> World:
    """With that fault in it."""
    world = World(scenario)
    if case.what == "message":
        _meddle(world, case)
    else:
        _break_step(world, case)
    return world


def _meddle(world: World, case: Case) -> None:
    network = world.network

    def meddle(connection: Connection, sender: End, message: Any) -> list[tuple[Any, float]]:
        if network.num_messages != case.number + 1:
            return [(message, 0.0)]
        receiver = next(end for end in connection.ends if end is not sender)
        match case.fault:
            case "sender dies" | "receiver dies":
                world.lose_process(sender.host if case.fault == "sender dies" else receiver.host)
                return []
            case "connection breaks":
                connection.break_off("the connection was reset")
                return []
            case "arrives twice":
                # The beginning of a call is the transport's own: it comes once, before everything else.
                return [(message, 0.0)] * (2 if message[0] == "message" else 1)
            case "arrives late":
                return [(message, LATE_S if message[0] == "message" else 0.0)]
            case _:
                network.cut(sender.host, receiver.host)
                return [(message, 0.0)]

    network.meddle = meddle


def _break_step(world: World, case: Case) -> None:
    replica = world.replicas[0]

    def on_step() -> None:
        if replica.num_steps != case.number + 1:
            return
        match case.fault:
            case "rank 1 stops":
                replica.supervisor.spawn(replica.stop_rank(1, 60.0))
            case "leader hangs":
                replica.supervisor.spawn(replica.hang_leader(60.0))
            case "replica dies":
                replica.lose_leader()
                replica.lose_rank(0)
                replica.lose_rank(1)
            case "all ranks die":
                replica.lose_rank(0)
                replica.lose_rank(1)
            case _:
                replica.lose_rank(int(case.fault.split()[1]))

    replica.on_step = on_step
