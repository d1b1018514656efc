"""Layouts as they are served, each on one host or over three, with any two features of a layout together in one:
greedy tokens, logits and log-probabilities equal those of transformers. ``make layouts`` runs all layouts."""

from collections.abc import Callable

import pytest

from tests.layouts.models import LAYOUT_MODELS, MANY_HOSTS, Case, all_cases, make_layout_reference, pairwise
from tests.layouts.run import TOLERANCE, Hosts, largest_difference, run_layout
from tests.parity.reference import Reference
from tests.support.conformance import Conforms
from tests.support.hosts.fixture import MakeBed

pytestmark = pytest.mark.timeout(120)

CASES = pairwise(all_cases())


def test_pairs_are_all_there() -> None:
    def pairs(cases: list[Case]) -> set[frozenset[tuple[str, object]]]:
        return {frozenset((a, b)) for case in cases for a in case.features for b in case.features}

    assert pairs(CASES) == pairs(all_cases())
    assert len(CASES) < len(all_cases()) / 5


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    made: dict[str, Reference] = {}

    def get(name: str) -> Reference:
        if name not in made:
            made[name] = make_layout_reference(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture(scope="module")
def hosts(make_bed: MakeBed) -> Callable[[int], Hosts]:
    """``hosts(3)``: three hosts; ``hosts(1)``: this one."""
    made: list[Hosts] = []

    def get(number: int) -> Hosts:
        if number == 1:
            return Hosts()
        if not made:
            made.append(Hosts.of(make_bed(MANY_HOSTS)))
        return made[0]

    return get


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layout(
    references: Callable[[str], Reference], hosts: Callable[[int], Hosts], conforms: Conforms, case: Case
) -> None:
    layout = case.parallel
    degrees = {"pp": layout.pp, "dp": layout.dp, "tp": layout.tp, "ep": layout.ep}
    conforms(LAYOUT_MODELS[case.model].title, "float32", **degrees, oracle="transformers")
    reference = references(case.model)
    answer = run_layout(reference, layout, hosts(case.num_hosts))
    assert largest_difference(reference, layout, answer) <= TOLERANCE
