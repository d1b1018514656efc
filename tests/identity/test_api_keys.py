"""Which keys are right, and that nothing but the answer tells why one is not."""

import os
import statistics
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import Unauthenticated
from cluster.identity.api_keys import ApiKeys, KeyTable, make_table
from cluster.identity.key_file import KeyFile, KeyRecord, new_key
from cluster.identity.principal import ALL_SCOPES
from cluster.identity.reloaded import Reloaded
from engine.errors import InvalidOption

PEPPER = b"p" * 32


def key(tenant: str = "team-a", **changes: Any) -> tuple[str, KeyRecord]:
    return new_key(tenant, changes.pop("scopes", ["infer"]), PEPPER, 1000.0, os.urandom, **changes)


def table(*records: KeyRecord, plain: tuple[str, ...] = (), pepper: bytes = PEPPER) -> KeyTable:
    return make_table(KeyFile(records, plain), pepper, os.urandom)


def wrong_secret(of: str) -> str:
    return of[:-1] + ("0" if of[-1] != "0" else "1")


def unknown_id(of: str) -> str:
    prefix, _, secret = of.split("_")
    return f"{prefix}_{'f' * 12}_{secret}"


def test_keys_stand_for_their_tenants() -> None:
    (first, one), (second, two) = key(scopes=["infer"]), key(scopes=["metrics", "admin"])
    keys = table(one, two)
    found = keys.check(first, 1000.0)
    assert (found.tenant, found.key_id, found.kind, found.scopes) == ("team-a", one.id, "key", {"infer"})
    assert keys.check(second, 1000.0).scopes == {"admin", "metrics"}
    for bad in (wrong_secret(first), unknown_id(first), first[:-1], first + "0", first.upper(), "", "rmd__"):
        with pytest.raises(Unauthenticated, match="^the API key is not valid here$"):
            keys.check(bad, 1000.0)


def test_another_pepper_knows_no_key() -> None:
    text, record = key()
    with pytest.raises(Unauthenticated, match="not valid"):
        table(record, pepper=b"q" * 32).check(text, 1000.0)


def test_expiry_is_to_the_second_and_told_to_the_keys_holder_alone() -> None:
    text, record = key(lifetime_s=60.0)
    keys = table(record)
    keys.check(text, 1059.9)
    with pytest.raises(Unauthenticated, match="expired"):
        keys.check(text, 1060.0)
    with pytest.raises(Unauthenticated, match="not valid"):
        keys.check(wrong_secret(text), 1060.0)


def test_a_revoked_key_is_none() -> None:
    text, record = key()
    keys = table(msgspec.structs.replace(record, revoked_unix_s=1))
    with pytest.raises(Unauthenticated, match="was revoked"):
        keys.check(text, 1000.0)
    with pytest.raises(Unauthenticated, match="not valid"):
        keys.check(wrong_secret(text), 1000.0)


def test_what_could_not_be_read_is_tried_again_though_it_looks_the_same(tmp_path: Path) -> None:
    """As on a network file system that answers with an error for a while."""
    path, answers = tmp_path / "keys", ["one", None, "two"]
    path.write_text("")

    def load() -> str:
        answer = answers.pop(0)
        if answer is None:
            raise InvalidOption("not now")
        return answer

    file = Reloaded([path], load)
    path.write_text("changed")
    assert not file.poll() and file.value == "one"
    assert file.poll() and file.value == "two" and not file.poll()


def test_keys_in_plain_text_may_do_everything_for_the_default_tenant() -> None:
    found = table(plain=("alpha-of-the-herd",)).check("alpha-of-the-herd", 0.0)
    assert (found.tenant, found.scopes) == ("default", ALL_SCOPES) and found.key_id.startswith("plain-")
    assert "alpha-of-the-herd" not in repr(found)


@given(st.text(max_size=200))
def test_no_text_is_an_error_of_ours(text: str) -> None:
    _, record = key()
    with pytest.raises(Unauthenticated):
        table(record).check(text, 1000.0)


def lines_run(keys: KeyTable, text: str) -> list[tuple[str, int]]:
    """Every line of ours that checking ``text`` runs, in order."""
    ran: list[tuple[str, int]] = []

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        if "cluster/identity" in frame.f_code.co_filename:
            if event == "line":
                ran.append((frame.f_code.co_name, frame.f_lineno))
            return trace
        return None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        keys.check(text, 1000.0)
    except Unauthenticated:
        pass
    finally:
        sys.settrace(before)
    return ran


def test_an_unknown_id_and_a_wrong_secret_run_the_same_lines() -> None:
    text, record = key()
    keys = table(record)
    ran = lines_run(keys, wrong_secret(text))
    assert len(ran) > 5 and lines_run(keys, unknown_id(text)) == ran
    assert lines_run(keys, text)[: len(ran) - 1] == ran[:-1]


def test_time_does_not_tell_how_much_of_a_secret_is_right() -> None:
    """Wide margins: this sees a comparison that ends early, or a missing one, on keys of a thousand records."""
    pairs = [key() for _ in range(1000)]
    keys = table(*(record for _, record in pairs))
    text = pairs[500][0]
    last, first, unknown = wrong_secret(text), text[:17] + wrong_secret(text[17:18]) + text[18:], unknown_id(text)
    times: dict[str, list[int]] = {last: [], first: [], unknown: []}
    for _ in range(2000):
        for candidate, taken in times.items():
            began = time.perf_counter_ns()
            with pytest.raises(Unauthenticated):
                keys.check(candidate, 1000.0)
            taken.append(time.perf_counter_ns() - began)
    medians = [statistics.median(taken) for taken in times.values()]
    assert max(medians) < 1.5 * min(medians)


def test_a_keys_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("alpha-of-the-herd\n")
    keys = ApiKeys(path, None, os.urandom)
    keys.check("alpha-of-the-herd", 0.0)
    path.write_text("beta-of-the-herd\n")
    assert keys.poll() and not keys.poll()
    keys.check("beta-of-the-herd", 0.0)
    with pytest.raises(Unauthenticated):
        keys.check("alpha-of-the-herd", 0.0)


@pytest.mark.parametrize("broken", ["{", "\xff"])
def test_a_broken_file_leaves_what_was_and_is_tried_again(
    broken: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys"
    path.write_text("alpha-of-the-herd\n")
    keys = ApiKeys(path, None, os.urandom)
    path.write_text(broken, encoding="latin-1")
    for _ in range(3):
        assert not keys.poll()
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 1
    keys.check("alpha-of-the-herd", 0.0)
    path.unlink()
    assert not keys.poll()
    path.write_text("beta-of-the-herd\n")
    assert keys.poll()
    keys.check("beta-of-the-herd", 0.0)


def test_taking_all_keys_away_lets_nobody_in(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("alpha-of-the-herd\n")
    keys = ApiKeys(path, None, os.urandom)
    path.write_text("# none\n")
    assert keys.poll()
    with pytest.raises(Unauthenticated):
        keys.check("alpha-of-the-herd", 0.0)


def test_records_need_the_pepper(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text('{"id":"a","tenant":"t","digest":"' + "ab" * 32 + '","created_unix_s":0}\n')
    with pytest.raises(InvalidOption, match="pepper file"):
        ApiKeys(path, None, os.urandom)
    (tmp_path / "keys.pepper").write_text("short\n")
    with pytest.raises(InvalidOption, match="fewer than 32 bytes"):
        ApiKeys(path, None, os.urandom)


def test_keys_in_plain_text_among_tenants_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, pepper_file = tmp_path / "keys", tmp_path / "pepper"
    for file in (path, pepper_file):
        file.touch(mode=0o600)
    path.write_text("alpha-of-the-herd\n")
    pepper_file.write_bytes(PEPPER)
    keys = ApiKeys(path, pepper_file, os.urandom)
    assert not caplog.records
    _, made = key()
    path.write_bytes(b"alpha-of-the-herd\n" + msgspec.json.encode(made))
    assert keys.poll()
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "1 keys in plain text beside others" in warning and "alpha" not in warning
