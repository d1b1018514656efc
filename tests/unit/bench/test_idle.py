"""Whose a thread is."""

import pytest

from bench.idle import CONTROL, FRONT_END, LEADER, RANKS, RAY, owner


@pytest.mark.parametrize(
    ("part", "name", "whose"),
    [
        (RANKS, "worker.io", RAY),
        (RANKS, "ray::Rank.run", RANKS),
        (RANKS, "timer_manager", RAY),
        (CONTROL, "grpc_global_tim", RAY),
        (CONTROL, "remuda: control", CONTROL),
        (LEADER, "server.poll0", RAY),
        (LEADER, "event_engine", LEADER),
        (FRONT_END, "event_engine", FRONT_END),
    ],
)
def test_threads_of_grpc_are_rays_only_where_we_have_no_grpc(part: str, name: str, whose: str) -> None:
    assert owner(part, name) == whose
