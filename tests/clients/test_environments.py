"""Clients that need environments of their own; the first run installs them."""

import pytest

from tests.clients.environments import run_script

pytestmark = [pytest.mark.full, pytest.mark.timeout(1200)]


@pytest.mark.parametrize("name", ["litellm", "llama_index", "llama_stack"])
def test_client(name: str, url: str) -> None:
    assert run_script(name, url).splitlines()[-1] == "passed"
