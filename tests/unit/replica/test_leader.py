"""A leader without its actor, at the real step channel."""

import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from cluster.replica.build import CODE, software, with_checkpoint
from cluster.replica.events import Failed, decode_event
from cluster.replica.leader import Leader, LeaderConfig
from cluster.replica.model_source import ModelSource
from engine.executor.socket_rank import SocketRankChannel
from engine.messages import Hello, encode
from engine.model_config import ModelConfig
from tests.support.hosted_gang import small_plan

TINY = ModelSource("remuda-tiny")
WAIT_S = 60.0


@pytest.fixture
def leader(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Leader]:
    # This process is no leader: others look for leaders by that name.
    monkeypatch.setattr("cluster.replica.leader.setproctitle.setproctitle", lambda title: None)
    plan = small_plan("remuda-tiny", **getattr(request, "param", {}))
    made = Leader(LeaderConfig("r0", plan, "127.0.0.1", ["127.0.0.1"] * plan.parallel.num_ranks, "secret"))
    yield made
    made.stop()


def test_a_rank_of_another_build_is_refused_by_name(leader: Leader) -> None:
    endpoints = leader.open(0, ["127.0.0.1"])
    leader.start()
    channel = SocketRankChannel(endpoints.local, endpoints.secret, [0], WAIT_S)
    try:
        runs = with_checkpoint(software(), TINY.directory()) | {CODE: "changed"}
        channel.send(encode(Hello(0, 0, 1, "far", "cpu", runs)))
        failures: list[Failed] = []
        deadline_s = time.monotonic() + WAIT_S
        while not failures and time.monotonic() < deadline_s:
            lines = leader.poll(0.5).splitlines()
            failures = [event for event in map(decode_event, lines) if isinstance(event, Failed)]
    finally:
        channel.close()
    (failed,) = failures
    assert failed.kind == "StartFailed"
    assert failed.message.startswith("rank 0 on far (127.0.0.1) may not join: remuda's files changed, where the leader")


@pytest.mark.parametrize("leader", [{"tensor_parallel_size": 2, "expert_parallel_size": 2}], indirect=True)
def test_experts_are_balanced_over_the_hosts_that_ranks_have_now(leader: Leader) -> None:
    leader._model = ModelConfig.from_directory(TINY.directory())
    gang = SimpleNamespace(ranks=[Hello(0, rank, 1, "h", "cpu") for rank in range(2)])
    layouts = []
    for epoch, hosts in enumerate((["127.0.0.1", "127.0.0.1"], ["127.0.0.1", "127.0.0.2"])):
        leader.open(epoch, hosts)
        layouts.append(leader._expert_layout(gang))  # type: ignore[arg-type]
    assert [layout.ranks_per_host for layout in layouts] == [((2,),), ((1, 1),)]
