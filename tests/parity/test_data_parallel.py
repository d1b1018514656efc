"""Data-parallel attention of the other architectures (tests/layouts has Llama 3 and 4), with experts that work for all
groups: logits and greedy tokens equal those of transformers, through memory and between hosts."""

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

# (architecture, dp, tp, ep, pp, hosts): every kind of mixture.
CASES = [
    ("llama4-top2", 4, 1, 2, 1, 2),
    ("mixtral", 2, 2, 2, 1, 2),
    ("mixtral", 4, 1, 4, 1, 1),
    ("qwen3-moe", 2, 1, 1, 2, 1),
    ("qwen3-moe-unnormalized", 2, 2, 1, 1, 1),
    pytest.param("llama4-vision", 4, 2, 2, 1, 2, marks=pytest.mark.full),
    pytest.param("mixtral", 4, 2, 1, 1, 1, marks=pytest.mark.full),
    pytest.param("mixtral", 2, 2, 4, 2, 1, marks=pytest.mark.full),
    pytest.param("qwen3-moe", 4, 2, 4, 1, 1, marks=pytest.mark.full),
    pytest.param("qwen3-moe", 2, 2, 4, 2, 2, marks=pytest.mark.full),
    pytest.param("mistral", 2, 1, 1, 2, 1, marks=pytest.mark.full),
]


@pytest.mark.parametrize(("name", "dp", "tp", "ep", "pp", "num_hosts"), CASES)
def test_float32(
    reference: Callable[[str], Reference],
    conforms: Conforms,
    name: str,
    dp: int,
    tp: int,
    ep: int,
    pp: int,
    num_hosts: int,
) -> None:
    """Every group, with other prompts than the others at the same time, and with prompts in chunks while it decodes."""
    conforms(ARCHITECTURES[name].title, "float32", pp=pp, dp=dp, tp=tp, ep=ep, oracle="transformers")
    made = reference(name)
    arguments = (str(made.directory), tp, ep, Dtype.FLOAT32, made.prompts, NUM_NEW, pp, num_hosts, dp)
    ranks = run_ranks(run_rank, pp * dp * tp, *arguments)
    for sampling_rank in range((pp - 1) * dp * tp, pp * dp * tp, tp):
        for how in ("alone", "together"):
            for mine, expected in zip(ranks[sampling_rank][how], made.generated, strict=True):
                assert mine.token_ids == expected.token_ids
                np.testing.assert_allclose(mine.logits, expected.logits, rtol=0, atol=1e-4)
