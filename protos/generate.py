"""Generates cluster/rpc/generated from the .proto files beside this one.

    python protos/generate.py            writes the files
    python protos/generate.py --check    writes nothing; exit status 1 and the names of the files that differ

Needs the ``test`` extra (grpcio-tools, mypy-protobuf).
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

PROTO_DIR = Path(__file__).resolve().parent
VLLM_DIR = PROTO_DIR / "vllm"
TARGET_DIR = PROTO_DIR.parent / "cluster" / "rpc" / "generated"
PACKAGE = "cluster.rpc.generated"


def generate(target: Path) -> None:
    """Writes the modules, their stubs and empty ``__init__.py`` files into the empty directory ``target``."""
    _compile(PROTO_DIR, [path for path in PROTO_DIR.rglob("*.proto") if VLLM_DIR not in path.parents], target)
    make_imports_absolute(target, PACKAGE)
    # These import one another by their bare names.
    vllm = target / VLLM_DIR.name
    vllm.mkdir()
    _compile(VLLM_DIR, VLLM_DIR.glob("*.proto"), vllm)
    make_imports_absolute(vllm, f"{PACKAGE}.{vllm.name}")
    for directory in [target, *(path for path in target.rglob("*") if path.is_dir())]:
        (directory / "__init__.py").touch()


def _compile(root: Path, protos: Iterable[Path], target: Path) -> None:
    """Raises SystemExit where protoc fails. ``root``: what imports in the files are relative to."""
    outputs = [f"--{name}_out={target}" for name in ("python", "grpc_python", "mypy", "mypy_grpc")]
    # protoc starts its plug-ins by name: those of this interpreter's environment come first.
    plugins = [f"--plugin={name}={Path(sys.executable).parent / name}" for name in _PLUGINS]
    well_known = str(files("grpc_tools") / "_proto")
    paths = sorted(map(str, protos))
    status = protoc.main(["protoc", f"-I{root}", f"-I{well_known}", *plugins, *outputs, *paths])
    if status != 0:
        raise SystemExit(f"protoc failed with status {status}")


_PLUGINS = ("protoc-gen-mypy", "protoc-gen-mypy_grpc")


def make_imports_absolute(target: Path, package: str) -> None:
    """protoc writes imports relative to its own root; ours lies inside a package.

    Three forms occur: ``from a.b import c_pb2``, ``import a.b.c_pb2`` and (a file without a folder) ``import c_pb2``.
    Only modules generated here are rewritten, so google.protobuf's stay as they are.
    """
    modules = {
        ".".join(path.relative_to(target).with_suffix("").parts)
        for path in target.rglob("*.py")
        if path.name != "__init__.py"
    }
    folders = {module.rpartition(".")[0] for module in modules} - {""}
    for path in [*target.rglob("*.py"), *target.rglob("*.pyi")]:
        text = path.read_text()
        for folder in folders:
            text = re.sub(rf"^from {re.escape(folder)} import ", f"from {package}.{folder} import ", text, flags=re.M)
        for module in modules:
            folder, _, name = module.rpartition(".")
            source = f"{package}.{folder}".rstrip(".")
            text = re.sub(rf"^import {re.escape(module)} as ", f"from {source} import {name} as ", text, flags=re.M)
            if not folder:
                text = re.sub(rf"^import {re.escape(name)}$", f"from {source} import {name}", text, flags=re.M)
        path.write_text(text)


def contents(directory: Path) -> dict[str, str]:
    """Relative path → text of every generated file under ``directory``."""
    return {
        str(path.relative_to(directory)): path.read_text()
        for path in directory.rglob("*")
        if path.suffix in (".py", ".pyi")
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        wanted = contents(Path(scratch))
    found = contents(TARGET_DIR)
    changed = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if check:
        for name in changed:
            print(
                f"{TARGET_DIR.relative_to(PROTO_DIR.parent) / name} differs from what protos/ gives; run 'make protos'"
            )
        return 1 if changed else 0
    for name in changed:
        path = TARGET_DIR / name
        if name not in wanted:
            path.unlink()
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(wanted[name])
    print(f"{len(wanted)} files, {len(changed)} changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
