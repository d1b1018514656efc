"""Model directories that the front end's tests share."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from cluster.frontend.admission import Admission
from cluster.frontend.calls import TimeLimits
from cluster.frontend.encoding import PromptEncoder
from cluster.frontend.metrics import Metrics
from cluster.frontend.model_files import read_model_files
from cluster.frontend.service import Service
from cluster.frontend.tokenizer import Tokenizer
from tests.frontend import tokenizers_for_tests
from tests.frontend.scripted import FakeClock, ScriptedBackend

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


@pytest.fixture
def build(model_paths: dict[str, Path], tiny: Tokenizer) -> Any:
    services: list[Service] = []

    def make(
        script: Any, max_live: int = 8, limits: TimeLimits = TimeLimits()
    ) -> tuple[Service, ScriptedBackend, FakeClock]:
        backend = ScriptedBackend(script)
        files = read_model_files(model_paths["tiny"])
        encoder = PromptEncoder(tiny, files.vocab_size)
        clock = FakeClock()
        seeds = itertools.count(1000)
        service = Service(
            "m",
            files,
            encoder,
            backend,
            Admission(max_live),
            Metrics("m", backend.replicas),
            clock,
            limits,
            draw_seed=lambda: next(seeds),
        )
        services.append(service)
        return service, backend, clock

    yield make
    for service in services:
        service.encoder.close()
        service.work.close()
