"""One served cluster for the whole session: remuda-tiny, tp=2 ep=2, through the real command."""

import secrets
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
def secret_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the leader of ``served`` asks of front ends."""
    file = tmp_path_factory.mktemp("secret") / "secret"
    file.write_text(secrets.token_hex(32))
    return file


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory, collector: OtlpReceiver, secret_file: Path) -> Iterator[Served]:
    log: Path = tmp_path_factory.mktemp("served") / "serve.log"
    options = ("--otlp-endpoint", collector.endpoint, "--secret-file", str(secret_file))
    with Served(("remuda-tiny", "--tp", "2", "--ep", "2", *options), log) as server:
        yield server
