"""What a host cannot read is told as that cell's failure; everything else of the host is still measured."""

from pathlib import Path

import msgspec
import pytest
from huggingface_hub import constants

from cluster.doctor import check_hosts
from cluster.doctor.facts import HostFacts, HostQuestion
from cluster.doctor.finding import Level
from cluster.doctor.measure_host import measure_host

NO_NAME = "/" + "x" * 300
"""The kernel refuses to look for it, also where the user may do everything."""


def measured(model: str) -> HostFacts:
    question = HostQuestion("127.0.0.1", model, reads_disk=True)
    return msgspec.msgpack.decode(measure_host(msgspec.msgpack.encode(question)), type=HostFacts)


def test_a_checkpoint_and_a_cache_that_cannot_be_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", NO_NAME)
    facts = measured(NO_NAME)
    (checkpoint,) = check_hosts.check_checkpoints([facts])
    temporary, downloads = check_hosts.check_disks([facts])
    assert (checkpoint.level, downloads.level) == (Level.FAIL, Level.FAIL)
    assert "name too long" in checkpoint.value and "name too long" in downloads.value
    assert checkpoint.remedy and downloads.remedy
    assert temporary.level is not Level.FAIL or "MiB free" in temporary.value
    assert facts.available_bytes > 0


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    # A file whose first bytes nobody can read, as of a broken disk: an address space has nothing at 0.
    (tmp_path / "config.json").symlink_to("/proc/self/mem")
    facts = measured(str(tmp_path))
    assert facts.checkpoint is not None and facts.checkpoint.error is None
    (bad,) = check_hosts.check_read_rates([facts], {})
    assert bad.level is Level.FAIL and "error" in bad.value.lower() and bad.remedy
