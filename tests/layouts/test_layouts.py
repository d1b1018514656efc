"""Layouts as they are served, each on one host or over three, with any two features of a layout together in one:
greedy tokens, logits and log-probabilities equal those of transformers. ``make layouts`` runs all layouts."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import pytest

from tests.layouts.models import LAYOUT_MODELS, Case, all_cases, make_layout_reference, pairwise
from tests.layouts.run import TOLERANCE, Answer, Hosts, largest_difference, run_layout
from tests.layouts.table import left
from tests.parity.reference import Reference
from tests.support.conformance import Conforms
from tests.support.hosts.fixture import MakeBed
from tests.support.hosts.namespaces import why_not

pytestmark = pytest.mark.timeout(120)

CASES = pairwise(all_cases())


def test_pairs_are_all_there() -> None:
    def pairs(cases: list[Case]) -> set[frozenset[tuple[str, object]]]:
        return {frozenset((a, b)) for case in cases for a in case.features for b in case.features}

    assert pairs(CASES) == pairs(all_cases())
    assert len(CASES) < len(all_cases()) / 5


def test_a_case_that_failed_is_run_again() -> None:
    done, failed, *others = CASES
    assert left(CASES, {str(done): 0.0, str(failed): "rank 1 was slow"}) == [failed, *others]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    return lru_cache(lambda name: make_layout_reference(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="module")
def hosts(request: pytest.FixtureRequest) -> Callable[[int], Hosts]:
    """``hosts(3)``: three hosts, where they can be made; ``hosts(1)``: this one."""

    def make(number: int) -> Hosts:
        if number == 1:
            return Hosts()
        make_bed: MakeBed = request.getfixturevalue("make_bed")
        return Hosts.of(make_bed(number))

    return lru_cache(make)


@pytest.fixture(scope="module")
def answers(
    request: pytest.FixtureRequest, references: Callable[[str], Reference], hosts: Callable[[int], Hosts]
) -> Iterator[Mapping[Case, Future[Answer]]]:
    """Of the cases that this run has selected, two at once: a gang of more ranks than cores mostly waits for one of
    its own to be woken."""
    items = (item for item in request.session.items if isinstance(item, pytest.Function))
    params = [item.callspec.params["case"] for item in items if getattr(item.function, "__name__", "") == "test_layout"]
    chosen = [case for case in params if isinstance(case, Case) and (case.num_hosts == 1 or why_not() is None)]
    with ThreadPoolExecutor(2) as pool:
        futures = {
            case: pool.submit(run_layout, references(case.model), case.parallel, hosts(case.num_hosts))
            for case in chosen
        }
        yield futures
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.netns] if case.num_hosts > 1 else []) for case in CASES],
    ids=str,
)
def test_layout(
    references: Callable[[str], Reference], answers: Mapping[Case, Future[Answer]], conforms: Conforms, case: Case
) -> None:
    layout = case.parallel
    degrees = {"pp": layout.pp, "dp": layout.dp, "tp": layout.tp, "ep": layout.ep}
    conforms(LAYOUT_MODELS[case.model].title, "float32", **degrees, oracle="transformers")
    assert largest_difference(references(case.model), layout, answers[case].result()) <= TOLERANCE
