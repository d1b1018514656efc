"""Shapes of large mixtures are many small objects that live on: as in the command, collecting them waits."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _collect_later() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()
