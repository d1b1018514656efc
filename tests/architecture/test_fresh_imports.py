"""What the import contracts cannot see: a package's ``__init__`` runs first, and libraries import each other."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture.source_tree import ROOT, files, module_name, python_files, relative

TORCH_FREE = (
    "cluster/config.py",
    "cluster/errors.py",
    "cluster/frontend",
    "cluster/router",
    "cluster/rpc",
    "cluster/types.py",
    "engine/block_hash.py",
    "engine/config.py",
    "engine/errors.py",
    "engine/messages.py",
    "engine/request.py",
    "engine/scheduler",
)

PROBE = """
import importlib, json, sys
found = {}
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
    found[name] = [heavy for heavy in ("torch", "ray") if heavy in sys.modules]
print(json.dumps(found))
"""


def _torch_free_modules() -> list[str]:
    return [module_name(path) for path in python_files("cluster", "engine") if relative(path).startswith(TORCH_FREE)]


def _heavy_after_import(modules: list[str], folder: Path = ROOT) -> dict[str, list[str]]:
    """Import the modules one after another in a fresh interpreter; which of torch and ray were there after each."""
    command = [sys.executable, "-W", "error", "-c", PROBE, json.dumps(modules)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    found: dict[str, list[str]] = json.loads(result.stdout)
    return found


def test_front_end_router_and_scheduler_import_neither_torch_nor_ray() -> None:
    modules = _torch_free_modules()
    assert {"engine.scheduler", "cluster.router", "cluster.frontend"} <= set(modules)
    assert {name: heavy for name, heavy in _heavy_after_import(modules).items() if heavy} == {}


def test_the_control_process_starts_without_torch() -> None:
    """It imports torch while Ray starts, and quiets it before."""
    assert "torch" not in _heavy_after_import(["cluster.cli.control_process"])["cluster.cli.control_process"]


def test_the_probe_sees_torch(tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text("import torch\n")
    assert _heavy_after_import(["json", "planted"], tmp_path) == {"json": [], "planted": ["torch"]}


@pytest.mark.parametrize("top", ["cluster", "engine"])
def test_package_init_files_are_empty(top: str) -> None:
    inits = [path for path in files(top) if path.name == "__init__.py"]
    assert inits
    assert [relative(path) for path in inits if path.read_text().strip()] == []


@pytest.mark.parametrize("top", ["cluster", "engine"])
def test_every_folder_with_modules_is_a_package(top: str) -> None:
    folders = {path.parent for path in files(top) if path.suffix == ".py"}
    assert [relative(folder) for folder in folders if not (folder / "__init__.py").exists()] == []
