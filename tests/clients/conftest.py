"""One server of remuda-tiny for all clients. It computes; its template takes tools, as remuda-tiny's own does not.

What clients prove is protocol, streams, errors and, forced by a grammar, tools: not the quality of what it says. In
every run it is a front end with the engine in this process; in the full one all is done again with ``remuda serve``.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.frontend.bodies import CONVERSATION
from tests.frontend.real_engine import RealBackend
from tests.frontend.servers import TINY
from tests.frontend.threaded import serving
from tests.support.served import Served

MODEL = "remuda-tiny"


@contextmanager
def _in_process(path: Path) -> Iterator[str]:
    backend = RealBackend(path, kv_cache_bytes=32 * 2**20)
    try:
        with serving(backend, name=MODEL, model_path=path) as running:
            yield running.url
    finally:
        backend.close()


@contextmanager
def _served(path: Path) -> Iterator[str]:
    with Served((str(path),), path.with_name("serve.log")) as running:
        yield running.url


@pytest.fixture(
    scope="session",
    params=["front end", pytest.param("remuda serve", marks=[pytest.mark.full, pytest.mark.timeout(300)])],
)
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = tmp_path_factory.mktemp("clients") / MODEL
    path.mkdir()
    for file in TINY.iterdir():
        os.symlink(file, path / file.name)
    (path / "chat_template.jinja").write_text(CONVERSATION)
    with (_in_process if request.param == "front end" else _served)(path) as found:
        yield found
