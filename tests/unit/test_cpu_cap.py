"""Tests that cap ranks' CPU say why where that is not allowed."""

import os
from pathlib import Path

import pytest

from tests.support import cpu_cap


def test_without_control_groups_the_test_is_skipped_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_cap, "_ROOT", tmp_path / "there is none")
    with pytest.raises(pytest.skip.Exception, match="No such file"), cpu_cap.cpu_caps([os.getpid()], 0.4):
        pass
