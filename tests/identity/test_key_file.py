"""remuda keys and the file it writes."""

import json
import multiprocessing
import os
import stat
import tempfile
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cluster.cli.main import app
from cluster.identity.key_file import changing, digest_of, read_key_file, read_pepper
from engine.errors import InvalidOption

DIGEST = "ab" * 32


def remuda(*args: object) -> Result:
    return CliRunner().invoke(app, ["keys", *map(str, args)])


def created(path: Path, *args: object) -> dict[str, Any]:
    result = remuda("create", "--file", path, "--json", *args)
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def test_the_key_is_shown_once_and_only_its_hmac_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    made = created(path, "--tenant", "team-a", "--scope", "infer", "--scope", "admin", "--name", "ci")
    assert made["scopes"] == ["admin", "infer"] and made["state"] == "active"
    (record,) = read_key_file(path).records
    pepper = read_pepper(tmp_path / "keys.pepper")
    assert record.digest == digest_of(made["key"], pepper).hex()
    secret = made["key"].rpartition("_")[2]
    assert len(secret) == 64
    listed = remuda("list", "--file", path, "--json").stdout + remuda("list", "--file", path).stdout
    for text in (path.read_text(), listed):
        assert secret not in text and pepper.decode() not in text
    for file in (path, tmp_path / "keys.pepper"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_several_per_tenant_with_times(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    first, second = created(path, "--expires", "90d"), created(path)
    assert first["expires_unix_s"] - first["created_unix_s"] == 90 * 86400 and second["expires_unix_s"] is None
    assert remuda("revoke", first["id"], "--file", path).exit_code == 0
    states = {each["id"]: each["state"] for each in json.loads(remuda("list", "--file", path, "--json").stdout)}
    assert states == {first["id"]: "revoked", second["id"]: "active"}
    again = json.loads(remuda("revoke", first["id"], "--file", path, "--json").stdout)
    assert again["state"] == "revoked"


def test_plain_text_and_comments_stay(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# ours\nalpha-of-the-herd\n")
    made = created(path)
    file = read_key_file(path)
    assert file.plain == ("alpha-of-the-herd",) and [record.id for record in file.records] == [made["id"]]
    assert path.read_text().startswith("# ours\nalpha-of-the-herd\n{")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--tenant", "a b"], "no tenant's name"),
        (["--tenant", "../x"], "no tenant's name"),
        (["--scope", "root"], "give some of admin, infer, metrics"),
        (["--expires", "soon"], "write a number and s, m, h or d"),
        (["--expires", "0d"], "write a number"),
    ],
)
def test_bad_values_change_nothing(args: list[str], message: str, tmp_path: Path) -> None:
    result = remuda("create", "--file", tmp_path / "keys", *args)
    assert isinstance(result.exception, InvalidOption) and message in str(result.exception)
    assert not (tmp_path / "keys").exists()


def test_a_key_that_is_not_there(tmp_path: Path) -> None:
    created(tmp_path / "keys")
    result = remuda("revoke", "nobody", "--file", tmp_path / "keys")
    assert isinstance(result.exception, InvalidOption) and "has no key nobody" in str(result.exception)


@pytest.mark.parametrize(
    "line",
    [
        '{"id": "a", "tenant": "t", "digest": "hunter2", "created_unix_s": 0}',
        '{"id": "a", "tenant": "t", "digest": "abcd", "created_unix_s": 0}',
        f'{{"id": "a", "tenant": "t t", "digest": "{DIGEST}", "created_unix_s": 0}}',
        f'{{"id": "a", "tenant": "t", "digest": "{DIGEST}", "created_unix_s": 0, "scopes": ["root"]}}',
        f'{{"id": "a", "tenant": "t", "digest": "{DIGEST}", "created_unix_s": 0, "secret": "hunter2"}}',
        '{"id": "hunter2"',
    ],
)
def test_a_bad_line_is_named_and_not_quoted(line: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(line + "\n")
    with pytest.raises(InvalidOption) as caught:
        read_key_file(tmp_path / "keys")
    assert "hunter2" not in str(caught.value)


def _create_some(path: str) -> None:
    for _ in range(5):
        assert remuda("create", "--file", path).exit_code == 0


def test_writers_wait_for_each_other(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_create_some, args=(str(path),)) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(30)
        assert writer.exitcode == 0
    assert len(read_key_file(path).records) == 20
    assert sorted(os.listdir(tmp_path)) == ["keys", "keys.pepper"]


@pytest.mark.parametrize("line", ["=======", "[", "]", "hunter2", "hunter2hunter2h"])
def test_what_is_too_short_for_a_key_is_none(line: str, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    created(path)
    with path.open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(InvalidOption, match=r"keys, line 2: .* at least 16 characters") as caught:
        read_key_file(path)
    assert "hunter2" not in str(caught.value)
    path.write_text("hunter2hunter2hu\n")
    assert read_key_file(path).plain == ("hunter2hunter2hu",)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644])
def test_who_may_read_the_file_still_may(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    made = created(path)
    path.chmod(mode)
    assert remuda("revoke", made["id"], "--file", path).exit_code == 0
    assert stat.S_IMODE(path.stat().st_mode) == mode and read_key_file(path).records[0].revoked_unix_s


def owner(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")


@as_root
def test_the_file_stays_its_owners(tmp_path: Path) -> None:
    """An administrator's command beside a server that runs as another user, which must see what it did."""
    path = tmp_path / "keys"
    path.write_text("alpha-of-the-herd\n")
    path.chmod(0o644)
    os.chown(path, 12345, 12346)
    made = created(path)
    assert owner(path) == (12345, 12346, 0o644)
    assert owner(tmp_path / "keys.pepper") == (12345, 12346, 0o640)
    assert remuda("revoke", made["id"], "--file", path).exit_code == 0
    assert owner(path) == (12345, 12346, 0o644)


def _change_as_nobody(path: Path) -> None:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    with pytest.raises(InvalidOption, match="must belong to user 12345 and group 12346"), changing(path) as records:
        records.clear()


@as_root
def test_who_could_not_keep_the_owner_changes_nothing() -> None:
    # Not below tmp_path, which nobody else may enter.
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "keys"
        created(path)
        before = path.read_bytes()
        os.chown(path, 12345, 12346)
        path.chmod(0o644)
        os.chown(directory, 65534, 65534)
        nobody = multiprocessing.get_context("fork").Process(target=_change_as_nobody, args=(path,))
        nobody.start()
        nobody.join(60)
        assert nobody.exitcode == 0
        assert path.read_bytes() == before and sorted(os.listdir(directory)) == ["keys", "keys.pepper"]


def test_a_link_to_the_file_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    path = tmp_path / "keys"
    path.symlink_to(tmp_path / "real" / "keys")
    first, second = created(path), created(path)
    assert remuda("revoke", first["id"], "--file", path).exit_code == 0
    assert path.is_symlink() and os.listdir(tmp_path / "real") == ["keys"]
    records = read_key_file(tmp_path / "real" / "keys").records
    assert [(each.id, each.state(0.0)) for each in records] == [(first["id"], "revoked"), (second["id"], "active")]


def test_no_second_pepper_is_made(tmp_path: Path) -> None:
    """Where the first is lost, and where it is elsewhere and was not named."""
    path, elsewhere = tmp_path / "keys", tmp_path / "elsewhere"
    made = created(path, "--pepper-file", elsewhere)
    before = path.read_bytes()
    refused = remuda("create", "--file", path)
    assert isinstance(refused.exception, InvalidOption) and "--pepper-file" in str(refused.exception)
    assert path.read_bytes() == before and not (tmp_path / "keys.pepper").exists()
    created(path, "--pepper-file", elsewhere)
    assert remuda("revoke", made["id"], "--file", path).exit_code == 0, "which asks for no pepper"


def _create_when(asked: Event, path: str) -> None:
    assert asked.wait(60)
    _create_some(path)


def test_the_first_pepper_comes_under_the_lock(tmp_path: Path) -> None:
    """Else the slower of two first writers could read the other's before it is written."""
    path, context = tmp_path / "keys", multiprocessing.get_context("fork")
    asked = context.Event()
    # Forked before the lock is taken, which it would else hold too.
    writer = context.Process(target=_create_when, args=(asked, str(path)))
    writer.start()
    with changing(path):
        asked.set()
        deadline_s = time.monotonic() + 60
        while f"-> FLOCK  ADVISORY  WRITE {writer.pid} " not in Path("/proc/locks").read_text():
            assert time.monotonic() < deadline_s and writer.is_alive()
            time.sleep(0.01)
        assert os.listdir(tmp_path) == []
    writer.join(60)
    assert writer.exitcode == 0 and len(read_key_file(path).records) == 5
