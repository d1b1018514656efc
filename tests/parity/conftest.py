"""Each checkpoint is made, and each layout of it run, once in a session."""

from collections.abc import Callable

import pytest
import torch

from engine.config import Dtype
from tests.parity.architectures import make_reference
from tests.parity.reference import NUM_NEW, Reference
from tests.support.model_driver import Generated, run_rank
from tests.support.rank_pool import run_ranks

LayoutRunner = Callable[[str, int, int, Dtype], dict[str, list[Generated]]]


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    """By name of the architecture: the checkpoint and the oracle's results."""
    torch.set_num_threads(1)
    made: dict[str, Reference] = {}

    def get(name: str) -> Reference:
        if name not in made:
            made[name] = make_reference(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture(scope="session")
def run_layout(reference: Callable[[str], Reference]) -> LayoutRunner:
    """Rank 0's results of a gang: (architecture, tp, ep, dtype) to what was generated alone and together."""
    results: dict[tuple[str, int, int, Dtype], dict[str, list[Generated]]] = {}

    def run(name: str, tp: int, ep: int, dtype: Dtype) -> dict[str, list[Generated]]:
        key = (name, tp, ep, dtype)
        if key not in results:
            made = reference(name)
            arguments = (str(made.directory), tp, ep, dtype, made.prompts, NUM_NEW)
            results[key] = run_ranks(run_rank, tp, *arguments)[0]
        return results[key]

    return run
