"""Each base model with its adapters is made once in a session."""

from collections.abc import Callable

import pytest
import torch

from tests.lora.adapters import Adapted, make_adapted


@pytest.fixture(scope="session")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Adapted]:
    """By name of the base model."""
    torch.set_num_threads(1)
    made: dict[str, Adapted] = {}

    def get(name: str) -> Adapted:
        if name not in made:
            made[name] = make_adapted(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get
