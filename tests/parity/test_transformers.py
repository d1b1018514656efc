"""Logits and greedy tokens equal those of transformers, for every architecture in every legal layout."""

from collections.abc import Callable

import numpy as np
import pytest

from engine.config import Dtype
from tests.parity.architectures import Reference
from tests.parity.conftest import LayoutRunner
from tests.support.model_driver import Generated

pytestmark = pytest.mark.timeout(120)

DENSE_LAYOUTS = [(1, 1), (2, 1), (4, 1)]
MOE_LAYOUTS = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]
CASES = [
    *[(name, *layout) for name in ("llama2", "llama3.1") for layout in DENSE_LAYOUTS],
    *[(name, *layout) for name in ("llama4-scout", "llama4-maverick") for layout in MOE_LAYOUTS],
    *[(name, tp, 1) for name in ("biases", "dynamic") for tp in (1, 2)],
    ("llama4-top2", 2, 2),
    ("linear", 1, 1),
    ("yarn", 1, 1),
]
LAYOUT_IDS = [f"{name}-tp{tp}-ep{ep}" for name, tp, ep in CASES]


def assert_equal(ours: list[Generated], oracle: list[Generated], tolerance: float) -> None:
    for mine, expected in zip(ours, oracle, strict=True):
        assert expected.logits.std() >= 1.0, "an absolute tolerance means little on smaller logits"
        assert mine.token_ids == expected.token_ids
        np.testing.assert_allclose(mine.logits, expected.logits, rtol=0, atol=tolerance)


@pytest.mark.parametrize("how", ["alone", "together"])
@pytest.mark.parametrize(("name", "tp", "ep"), CASES, ids=LAYOUT_IDS)
def test_float32(
    reference: Callable[[str], Reference], run_layout: LayoutRunner, name: str, tp: int, ep: int, how: str
) -> None:
    """ "alone": each prompt in one step. "together": prompts in chunks while other sequences decode."""
    assert_equal(run_layout(name, tp, ep, Dtype.FLOAT32)[how], reference(name).generated, 1e-4)
