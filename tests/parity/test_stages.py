"""Pipeline stages of the other architectures (tests/layouts has Llama 3 and 4): logits and greedy tokens equal those of
transformers, on one host and between hosts."""

from collections.abc import Callable

import numpy as np
import pytest

from engine.config import Dtype
from tests.parity.architectures import ARCHITECTURES
from tests.parity.reference import NUM_NEW, Reference
from tests.support.conformance import Conforms
from tests.support.model_driver import run_rank
from tests.support.rank_pool import run_ranks

pytestmark = pytest.mark.timeout(120)

# (architecture, pp, tp, ep, hosts).
CASES = [
    ("llama1", 2, 1, 1, 1),
    ("dynamic", 2, 1, 1, 2),
    ("qwen3", 3, 1, 1, 1),
    ("mistral", 2, 1, 1, 1),
    pytest.param("llama4-vision", 2, 2, 1, 1, marks=pytest.mark.full),
    pytest.param("guard4", 4, 1, 1, 1, marks=pytest.mark.full),
    pytest.param("mixtral", 2, 2, 2, 2, marks=pytest.mark.full),
    pytest.param("qwen3-moe", 6, 1, 1, 1, marks=pytest.mark.full),
    pytest.param("qwen3-moe", 3, 2, 2, 2, marks=pytest.mark.full),
]


@pytest.mark.parametrize(("name", "pp", "tp", "ep", "num_hosts"), CASES)
def test_float32(
    reference: Callable[[str], Reference], conforms: Conforms, name: str, pp: int, tp: int, ep: int, num_hosts: int
) -> None:
    """Prompts whole and alone, and in chunks while others decode. ``num_hosts`` are loopback addresses: no memory is
    shared, and between tp ranks each sends its part of the columns."""
    conforms(ARCHITECTURES[name].title, "float32", pp=pp, tp=tp, ep=ep, oracle="transformers")
    made = reference(name)
    arguments = (str(made.directory), tp, ep, Dtype.FLOAT32, made.prompts, NUM_NEW, pp, num_hosts)
    last_stage = run_ranks(run_rank, pp * tp, *arguments)[(pp - 1) * tp]
    for how in ("alone", "together"):
        for mine, expected in zip(last_stage[how], made.generated, strict=True):
            assert mine.token_ids == expected.token_ids
            np.testing.assert_allclose(mine.logits, expected.logits, rtol=0, atol=1e-4)
