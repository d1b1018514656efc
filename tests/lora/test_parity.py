"""Requests of two adapters and of none, mixed in one step, get the logits that PEFT computes for each alone."""

from collections.abc import Callable

import numpy as np
import pytest

from tests.lora.mixed import Adapted, mixed_logits
from tests.support.rank_pool import run_ranks

LAYOUTS = [
    ("llama", 1, 1),
    ("llama", 2, 1),
    ("llama", 4, 1),
    ("llama4", 1, 1),
    ("llama4", 2, 1),
    ("llama4", 4, 2),
    ("mixtral", 1, 1),
    ("mixtral", 2, 2),
    pytest.param("llama4", 2, 2, marks=pytest.mark.full),
    pytest.param("llama4", 4, 4, marks=pytest.mark.full),
    pytest.param("mixtral", 2, 1, marks=pytest.mark.full),
]


@pytest.mark.parametrize(("name", "tp", "ep"), LAYOUTS)
def test_mixed_adapters(adapted: Callable[[str], Adapted], name: str, tp: int, ep: int) -> None:
    made = adapted(name)
    ours = mixed_logits(None, made, 1, 1) if tp == 1 else run_ranks(mixed_logits, tp, made, tp, ep)[0]
    for which, expected in made.logits.items():
        assert expected.std() >= 1.0, "an absolute tolerance means little on smaller logits"
        np.testing.assert_allclose(ours[which], expected, rtol=0, atol=1e-4)
