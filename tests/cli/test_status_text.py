"""What ``remuda status`` prints for people."""

import pytest

from cluster.cli.status import print_status
from cluster.types import ReplicaInfo, ReplicaState, ServerStatus
from engine.scheduler.expert_stats import ExpertStats


def printed(rank_pairs: tuple[int, ...], capsys: pytest.CaptureFixture[str]) -> str:
    replica = ReplicaInfo(
        id="r0",
        model="mixture",
        state=ReplicaState.READY,
        address="127.0.0.1:1",
        incarnation=1,
        max_model_len=1,
        max_num_seqs=1,
        block_size=1,
        num_blocks=1,
        experts=ExpertStats(1.2, rank_pairs, num_moves=0, num_failed_moves=0, num_moved_experts=0),
    )
    print_status(ServerStatus("mixture", "1", False, 0, 0, (replica,)))
    return capsys.readouterr().out


def test_each_ranks_share_of_the_experts_load_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert "  experts' load since the start: ep rank 0 60.0%, ep rank 1 30.0%, ep rank 2 10.0%\n" in printed(
        (600, 300, 100), capsys
    )


def test_before_the_first_token_there_are_no_shares(capsys: pytest.CaptureFixture[str]) -> None:
    assert "experts' load since the start: no token yet\n" in printed((0, 0), capsys)
