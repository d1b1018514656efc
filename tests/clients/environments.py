"""Environments of their own for clients that do not resolve with constraints.txt: made once, kept below .cache."""

import hashlib
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
CACHE = FOLDER.parents[1] / ".cache" / "clients"
_INSTALL_S = 900


def python_of(name: str) -> Path:
    """The interpreter of the environment with ``requirements/NAME.txt``. Raises CalledProcessError where pip fails."""
    requirements = FOLDER / "requirements" / f"{name}.txt"
    digest = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()[:12]
    directory = CACHE / f"{name}-{digest}"
    python, whole = directory / "bin" / "python", directory / "whole"
    if not whole.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(directory)], check=True, timeout=_INSTALL_S)
        pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "-r", str(requirements)]
        subprocess.run(pip, check=True, timeout=_INSTALL_S)
        whole.touch()
    return python


def run_script(name: str, url: str) -> str:
    """What ``scripts/NAME.py URL`` writes in its environment. Raises AssertionError where it fails."""
    script = FOLDER / "scripts" / f"{name}.py"
    done = subprocess.run(
        [str(python_of(name)), str(script), url], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout
