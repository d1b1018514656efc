"""Model directories that the front end's tests share."""

from pathlib import Path

import pytest

from cluster.frontend.model_files import read_model_files
from cluster.frontend.tokenizer import Tokenizer
from tests.frontend import tokenizers_for_tests

TINY = Path(__file__).parents[2] / "engine" / "assets" / "remuda-tiny"


@pytest.fixture(scope="session")
def model_paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "byte-level": tokenizers_for_tests.byte_level(folder / "llama3"),
        "llama4": tokenizers_for_tests.byte_level(folder / "llama4", tokenizers_for_tests.LLAMA4_TEMPLATE),
        "sentencepiece": tokenizers_for_tests.sentencepiece(folder / "llama2"),
        "tiny": TINY,
    }


@pytest.fixture(scope="session")
def loaded(model_paths: dict[str, Path]) -> dict[str, Tokenizer]:
    return {name: Tokenizer(read_model_files(path)) for name, path in model_paths.items()}


@pytest.fixture(scope="session")
def tiny(loaded: dict[str, Tokenizer]) -> Tokenizer:
    return loaded["tiny"]
