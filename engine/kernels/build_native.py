"""Builds the C++ library when the package is built or installed (a hook of hatchling), or by hand:
``python engine/kernels/build_native.py``.

Where there is no C++ compiler the package is built without it: everything runs on torch alone, more slowly, and says so
at start-up. Imports nothing of the project, because it runs before the project is installed.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_HERE = Path(__file__).parent
LIBRARY = _HERE / "libremuda_native.so"
_FLAGS = ["-std=c++17", "-O3", "-shared", "-fPIC", "-w"]


def build() -> bool:
    """Compile; False, with a message on stderr, where that is not possible."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        print("remuda: no C++ compiler found (g++); built without its native kernels", file=sys.stderr)
        return False
    sources = sorted(str(path) for path in (_HERE / "native").glob("*.cpp"))
    finished = _HERE / f"{LIBRARY.name}.{os.getpid()}"
    command = [compiler, *_FLAGS, *sources, "-o", str(finished)]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    if outcome.returncode != 0:
        reason = outcome.stderr[-2000:]
        print(f"remuda: built without its native kernels, {compiler} failed:\n{reason}", file=sys.stderr)
        return False
    finished.replace(LIBRARY)  # a process that has loaded the former one keeps it
    return True


class NativeBuildHook(BuildHookInterface[Any]):
    """Called by hatchling before a wheel, also an editable one, is put together."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name == "wheel" and build():
            build_data["pure_python"] = False
            # No part of Python's own binary interface is used, only the platform's.
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
            build_data["artifacts"].append(f"engine/kernels/{LIBRARY.name}")


if __name__ == "__main__":
    raise SystemExit(0 if build() else 1)
