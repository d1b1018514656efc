"""Experts that move between the ranks of real gangs while requests run."""

from pathlib import Path
from typing import Any

import pytest

from engine.request import Request
from tests.parity.architectures import Reference, make_reference
from tests.support.balanced_gang import EAGER, balanced_gang
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


def test_what_ranks_count_is_what_was_routed(mixtral: Reference) -> None:
    """Two of four experts for each token in each layer; the last steps are not yet told."""
    with balanced_gang(str(mixtral.directory), EAGER, tp=2, ep=2, num_redundant_experts=2) as served:
        num_tokens = sum(
            len(request.token_ids) + len(tokens) - 1
            for request, tokens in zip(many_requests(mixtral), served.run(many_requests(mixtral)).values(), strict=True)
        )
        told = sum(served.stats.rank_pairs)
        assert 0.5 * num_tokens * 2 * 2 < told <= num_tokens * 2 * 2


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
