"""One front end over remuda-tiny for all clients. It computes; its template takes tools, as remuda-tiny's own does not.

What clients prove is protocol, streams, errors and, forced by a grammar, tools: not the quality of what it says.
"""

import os
from collections.abc import Iterator

import pytest

from tests.frontend.bodies import CONVERSATION
from tests.frontend.real_engine import RealBackend
from tests.frontend.servers import TINY, Served
from tests.frontend.threaded import serving

MODEL = "remuda-tiny"


@pytest.fixture(scope="session")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    path = tmp_path_factory.mktemp("clients") / MODEL
    path.mkdir()
    for file in TINY.iterdir():
        os.symlink(file, path / file.name)
    (path / "chat_template.jinja").write_text(CONVERSATION)
    backend = RealBackend(path, kv_cache_bytes=32 * 2**20)
    try:
        with serving(backend, name=MODEL, model_path=path) as running:
            yield running
    finally:
        backend.close()


@pytest.fixture(scope="session")
def url(one: Served) -> str:
    return one.url
