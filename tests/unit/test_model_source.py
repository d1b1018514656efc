"""What MODEL may be, offline as all tests are: directories, hub ids in the cache, and what is refused."""

from pathlib import Path

import pytest
from huggingface_hub import constants

from cluster.replica.model_source import ModelSource, resolve
from engine.errors import CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache, in the hub library's own form, that holds one revision of one model."""
    repo = tmp_path / "models--team--pony"
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_the_embedded_model_is_in_the_package() -> None:
    directory = resolve("remuda-tiny", None).directory()
    assert (directory / "model.safetensors").is_file()


def test_a_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    source = resolve(str(tmp_path), None)
    assert source == ModelSource(str(tmp_path.resolve()))
    assert source.directory() == tmp_path.resolve()


def test_a_directory_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        resolve(str(tmp_path), None)


def test_a_path_that_does_not_exist_is_refused_with_what_would_be_right() -> None:
    with pytest.raises(CheckpointError, match="not a directory.*hub id"):
        resolve("/nowhere/at/all", None)


def test_a_hub_id_is_pinned_to_a_commit_and_found_in_the_cache(hub_cache: Path) -> None:
    source = resolve("team/pony", None)
    assert source == ModelSource("team/pony", COMMIT)
    assert source.directory() == hub_cache / "models--team--pony" / "snapshots" / COMMIT


@pytest.mark.parametrize(("name", "revision"), [("team/horse", None), ("team/pony", "v2"), ("team/pony", "f" * 40)])
def test_what_the_cache_lacks_is_refused_offline(hub_cache: Path, name: str, revision: str | None) -> None:
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE"):
        resolve(name, revision).directory()
