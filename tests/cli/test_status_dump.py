"""``remuda status --dump FILE``: what is in the file afterwards."""

import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.cli.status import _write
from engine.errors import InvalidRequest

EARLIER = b'{"kind": "head"}\n'


def parts(*given: bytes, then: Exception | None = None) -> Iterator[bytes]:
    yield from given
    if then is not None:
        raise then


@pytest.mark.parametrize("before", [(), (b"one\n",)])
def test_an_earlier_record_stays_where_no_other_comes(tmp_path: Path, before: tuple[bytes, ...]) -> None:
    file = tmp_path / "record.jsonl"
    file.write_bytes(EARLIER)
    with pytest.raises(InvalidRequest, match="name one of the replicas"):
        _write(file, parts(*before, then=InvalidRequest("name one of the replicas: r0", "replica")))
    assert file.read_bytes() == EARLIER
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_that_everybody_could_read_is_readable_by_its_user_alone(tmp_path: Path) -> None:
    file, link = tmp_path / "record.jsonl", tmp_path / "link"
    file.write_bytes(EARLIER)
    file.chmod(0o644)
    link.symlink_to(file)
    assert _write(link, parts(b"one\n", b"two\n")) == 8
    assert file.read_bytes() == b"one\ntwo\n" and link.is_symlink()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_pipe_is_written_to_and_stays_one(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    assert _write(pipe, parts(b"one\n")) == 4
    reader.join(30)
    assert read == [b"one\n"] and pipe.is_fifo()
