"""Each file is made once in a session."""

from collections.abc import Callable

import pytest
import torch

from tests.gguf.models import Reference, make_reference


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    """By name of the case: the file and the oracle's results."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("gguf-models")
    made: dict[str, Reference] = {}

    def get(name: str) -> Reference:
        if name not in made:
            made[name] = make_reference(name, folder)
        return made[name]

    return get
