"""Experts that move between the ranks of real gangs while requests run."""

from pathlib import Path
from typing import Any

import pytest

from engine.errors import RankFailure
from engine.request import Request
from engine.scheduler.expert_balancer import BalanceConfig
from tests.parity.architectures import make_reference
from tests.parity.reference import Reference
from tests.support.balanced_gang import EAGER, BalancedGang, balanced_gang
from tests.support.gang_engine import gang_engine, make_request, tokens_of

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_reference("mixtral", tmp_path_factory.mktemp("mixtral"))


def many_requests(reference: Reference) -> list[Request]:
    return [
        make_request(f"{copy}-{i}", prompt[copy:], max_tokens=70)
        for copy in range(4)
        for i, prompt in enumerate(reference.prompts)
    ]


@pytest.fixture(scope="module")
def expected(mixtral: Reference) -> dict[str, list[int]]:
    with gang_engine(mixtral) as alone:
        return {name: tokens_of(outputs) for name, outputs in alone.run(many_requests(mixtral)).items()}


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param({"tp": 2, "ep": 2, "num_redundant_experts": 2}, id="replicated"),
        pytest.param({"dp": 2, "tp": 2, "ep": 4, "num_redundant_experts": 4, "depth": 2}, id="exchanged"),
        pytest.param({"tp": 2, "pp": 2, "ep": 2, "depth": 2}, id="stages", marks=pytest.mark.full),
        pytest.param({"tp": 4, "ep": 2, "num_redundant_experts": 2}, id="divided", marks=pytest.mark.full),
    ],
)
def test_tokens_do_not_change_when_experts_move(
    mixtral: Reference, expected: dict[str, list[int]], layout: dict[str, Any]
) -> None:
    """Many times, with requests running all the time: no token is lost, computed twice or with two tables."""
    with balanced_gang(str(mixtral.directory), EAGER, **layout) as served:
        for _ in range(3):
            assert served.run(many_requests(mixtral)) == expected
        stats = served.stats
        assert stats.num_moves >= 2 and stats.num_moved_experts >= 2 and stats.num_failed_moves == 0
        assert served.balancer.placements(), "the experts are where they were"


@pytest.mark.full
@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_quantized_experts_move_in_their_format(mixtral: Reference, quantization: str) -> None:
    """Each expert is quantized by itself while it is read, so the same wherever it is."""
    never = BalanceConfig(interval_s=1e9)
    tokens = []
    for balance in (never, EAGER):
        layout: dict[str, Any] = {"dp": 2, "ep": 2, "num_redundant_experts": 2, "quantization": quantization}
        with balanced_gang(str(mixtral.directory), balance, **layout) as served:
            tokens += [served.run(many_requests(mixtral)) for _ in range(2)]
            assert (served.stats.num_moves > 0) == (balance is EAGER) and served.stats.num_failed_moves == 0
    assert tokens == tokens[:1] * 4


def test_what_ranks_count_is_what_was_routed(mixtral: Reference) -> None:
    """Two of four experts for each token in each layer; the last steps are not yet told."""
    with balanced_gang(str(mixtral.directory), EAGER, tp=2, ep=2, num_redundant_experts=2) as served:
        num_tokens = sum(
            len(request.token_ids) + len(tokens) - 1
            for request, tokens in zip(many_requests(mixtral), served.run(many_requests(mixtral)).values(), strict=True)
        )
        told = sum(served.stats.rank_pairs)
        assert 0.5 * num_tokens * 2 * 2 < told <= num_tokens * 2 * 2


@pytest.mark.parametrize("layout", [{"tp": 2, "ep": 2}, {"dp": 2, "ep": 2}], ids=["replicated", "exchanged"])
def test_a_rank_that_dies_while_experts_move(
    mixtral: Reference, expected: dict[str, list[int]], layout: dict[str, Any]
) -> None:
    """The others keep what plans have used, whatever they were reading; the new one reads the same."""
    with balanced_gang(str(mixtral.directory), EAGER, num_redundant_experts=2, **layout) as served:
        served.run(many_requests(mixtral))
        for victim in (1, 0):
            outputs = _until_one_dies(served, mixtral, victim, expected)
            placements = served.balancer.placements()
            served.reform()
            assert served.balancer.table == 0 and not served.balancer.is_moving
            assert served.balancer.placements() == placements
            while served.engine.has_work:
                for output in served.engine.step():
                    outputs[output.request_id] += output.token_ids
            assert outputs == expected
        assert served.stats.num_failed_moves == 0
        _until_one_moves(served, mixtral, expected)


def _until_one_moves(served: BalancedGang, mixtral: Reference, expected: dict[str, list[int]]) -> None:
    """Moves begin when loads say so, so that a round of requests may pass without one."""
    num_moves = served.stats.num_moves
    for _ in range(10):
        assert served.run(many_requests(mixtral)) == expected
        if served.stats.num_moves > num_moves and served.stats.num_failed_moves == 0:
            return
    pytest.fail("no expert moved")


def _until_one_dies(
    served: BalancedGang, mixtral: Reference, victim: int, expected: dict[str, list[int]]
) -> dict[str, list[int]]:
    """What came until ``victim``, killed in the middle of a move, was missed;
    a round may pass without a move here too."""
    is_killed = False
    for _ in range(10):
        outputs: dict[str, list[int]] = {}
        for request in many_requests(mixtral):
            served.engine.add(request)
            outputs[request.request_id] = []
        try:
            while served.engine.has_work:
                if served.balancer.is_moving and not is_killed:
                    served.gang.processes[victim].kill()
                    is_killed = True
                for output in served.engine.step():
                    outputs[output.request_id] += output.token_ids
        except RankFailure:
            return outputs
        assert outputs == expected
    pytest.fail("no rank failed" if is_killed else "no expert moved")


def test_a_move_that_cannot_be_read_leaves_everything_as_it_is(
    mixtral: Reference, expected: dict[str, list[int]], tmp_path: Path
) -> None:
    """The checkpoint's file is another one: no rank may mix the two."""
    for file in mixtral.directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with balanced_gang(str(tmp_path), EAGER, tp=2, ep=2, num_redundant_experts=2) as served:
        weights = tmp_path / "model.safetensors"
        content = weights.read_bytes()
        weights.unlink()
        weights.write_bytes(content)
        assert served.run(many_requests(mixtral)) == expected
        stats = served.stats
        assert stats.num_failed_moves == 1 and stats.num_moves == 0  # and it waits before it tries again
        assert served.balancer.placements() == [] and served.balancer.table == 0
