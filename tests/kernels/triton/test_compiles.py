"""Every kernel compiles for a GPU: the interpreter takes more of Python than the compiler does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.triton import compile_for_hopper


@pytest.mark.full
@pytest.mark.timeout(240)
def test_every_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, str(Path(compile_for_hopper.__file__))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=230, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(set(done.stdout.split())) == 12, "kernels by name"
