"""Where Ray's token of a group of hosts comes from."""

import os
from pathlib import Path

import pytest

from cluster.config import Device
from cluster.control.group_host import GroupHost, group_token, ray_token


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests set these; afterwards they are gone."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "before")


def test_it_is_made_from_the_secret() -> None:
    with group_token(GroupHost("10.0.0.1", Device.CPU, 1, "one")) as file:
        assert file.read_text() == ray_token("one") != ray_token("two")
        assert file.stat().st_mode & 0o077 == 0
        assert (os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN_PATH"]) == ("token", str(file))
    assert not file.exists()


def test_or_it_is_the_one_that_others_know(tmp_path: Path) -> None:
    """KubeRay's init container waits for the head with it."""
    given = tmp_path / "ray-token"
    given.write_text("theirs")
    with group_token(GroupHost("10.0.0.1", Device.CPU, 1, "one", given)) as file:
        assert file == given and os.environ["RAY_AUTH_TOKEN_PATH"] == str(given)
    assert given.read_text() == "theirs"
