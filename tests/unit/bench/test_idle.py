"""Whose a process and a thread is, and what is made of it."""

import pytest

from bench.idle import CONTROL, FRONT_END, LEADER, RANKS, RAY, owner, part_of, rows_of


@pytest.mark.parametrize(
    ("title", "part"),
    [
        ("remuda: control", CONTROL),
        ("remuda: ray guardian", CONTROL),
        ("remuda: leader replica-0", LEADER),
        ("remuda: rank 1", RANKS),
        ("ray::LeaderProcess.poll", LEADER),
        ("ray::Rank.run", RANKS),
        ("ray::DashboardAgent", RAY),
        ("/usr/bin/gcs_server --log_dir=/tmp", RAY),
    ],
)
def test_processes_are_known_by_their_titles(title: str, part: str) -> None:
    assert part_of(title) == part


def test_what_our_processes_use_in_all_has_rays_threads_in_it() -> None:
    ours = [
        {FRONT_END: 0.2, LEADER: 0.1, CONTROL: 0.05, RANKS: 0.05},
        {FRONT_END: 0.4, LEADER: 0, CONTROL: 0, RANKS: 0},
    ]
    rows = rows_of(ours, inside=[0.8, 1.0], rays=[2.0, 2.0])
    (found,) = [each for each in rows if each.case.startswith("our processes in all: 1.30 % of a core (1.20 to 1.40)")]
    assert found.ours.median == pytest.approx(1.3)
    assert [each.ours.high for each in rows if each.case.startswith("our threads:")] == [pytest.approx(0.4)]
    assert [each.ours.high for each in rows if "leader and ranks" in each.case] == [pytest.approx(0.15)]


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
