from collections.abc import Iterator

import pytest

from tests.structured.engine_bed import Bed


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    made = Bed()
    yield made
    made.close()
