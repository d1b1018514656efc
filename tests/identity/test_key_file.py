"""remuda keys and the file it writes."""

import json
import multiprocessing
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cluster.cli.main import app
from cluster.identity.key_file import digest_of, read_key_file, read_pepper
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
    path.write_text("# ours\nalpha\n")
    made = created(path)
    file = read_key_file(path)
    assert file.plain == ("alpha",) and [record.id for record in file.records] == [made["id"]]
    assert path.read_text().startswith("# ours\nalpha\n{")


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
