"""Tiny checkpoints that most tests of the engine serve, with what transformers makes of them."""

import pytest

from tests.parity.architectures import make_reference
from tests.parity.reference import Reference


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Tied embeddings: the first stage and the last have them."""
    return make_reference("llama3.1", tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Some of its layers forget: attention in chunks."""
    return make_reference("llama4-scout", tmp_path_factory.mktemp("mixture"))
