"""Logits and greedy tokens equal those of transformers, for every architecture in every legal layout."""

from collections.abc import Callable

import numpy as np
import pytest

import engine.model_config as served
from engine.config import Dtype
from tests.parity.architectures import ARCHITECTURES, DENSE_LAYOUTS, MODEL_CLASSES, MOE_LAYOUTS
from tests.parity.conftest import LayoutRunner
from tests.parity.reference import Reference
from tests.support.conformance import Conforms
from tests.support.model_driver import Generated

pytestmark = pytest.mark.timeout(120)

CASES = [
    pytest.param(
        name,
        *layout,
        id=f"{name}-tp{layout[0]}-ep{layout[1]}",
        marks=[] if layout in architecture.layouts else pytest.mark.full,
    )
    for name, architecture in ARCHITECTURES.items()
    for layout in architecture.legal_layouts
]


def test_the_table_covers_what_is_served() -> None:
    tested = {MODEL_CLASSES[type(architecture.config)].__name__ for architecture in ARCHITECTURES.values()}
    assert tested == set(served.ARCHITECTURES)
    by_default = {layout for architecture in ARCHITECTURES.values() for layout in architecture.layouts}
    assert by_default == set(DENSE_LAYOUTS) | set(MOE_LAYOUTS)
    for architecture in ARCHITECTURES.values():
        assert set(architecture.layouts) <= set(architecture.legal_layouts)


def assert_equal(ours: list[Generated], oracle: list[Generated], tolerance: float) -> None:
    for mine, expected in zip(ours, oracle, strict=True):
        assert expected.logits.std() >= 1.0, "an absolute tolerance means little on smaller logits"
        assert mine.token_ids == expected.token_ids
        np.testing.assert_allclose(mine.logits, expected.logits, rtol=0, atol=tolerance)


@pytest.mark.parametrize("how", ["alone", "together"])
@pytest.mark.parametrize(("name", "tp", "ep"), CASES)
def test_float32(
    reference: Callable[[str], Reference],
    run_layout: LayoutRunner,
    conforms: Conforms,
    name: str,
    tp: int,
    ep: int,
    how: str,
) -> None:
    """ "alone": each prompt in one step. "together": prompts in chunks while other sequences decode."""
    conforms(ARCHITECTURES[name].title, "float32", tp=tp, ep=ep, oracle="transformers")
    assert_equal(run_layout(name, tp, ep, Dtype.FLOAT32)[how], reference(name).generated, 1e-4)
