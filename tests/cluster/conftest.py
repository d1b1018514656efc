"""One served cluster for the whole session: remuda-tiny, tp=2 ep=2, through the real command."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.otlp_receiver import OtlpReceiver
from tests.support.served import Served


@pytest.fixture(scope="session")
def collector() -> Iterator[OtlpReceiver]:
    """Gets the traces of ``served``."""
    with OtlpReceiver() as receiver:
        yield receiver


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory, collector: OtlpReceiver) -> Iterator[Served]:
    log: Path = tmp_path_factory.mktemp("served") / "serve.log"
    with Served(("remuda-tiny", "--tp", "2", "--ep", "2", "--otlp-endpoint", collector.endpoint), log) as server:
        yield server
