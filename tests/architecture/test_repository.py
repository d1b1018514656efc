"""What the repository promises about itself: words, documents, pins and targets."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.architecture.source_tree import ROOT, files, relative

# Spelled in two parts so that this file does not hold them.
FORBIDDEN = re.compile(
    "|".join(["\\.\\./sha" + "red", "/wo" + "rk/", "/ro" + "ot/", "/opt/py" + "pi", "/opt/whe" + "els"])
)
TEXT_SUFFIXES = {"", *".py .pyi .md .toml .txt .json .yaml .yml .sh .proto .cpp .h .jinja".split()}
EXACT_PIN = re.compile(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+")


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_no_file_names_a_place_outside_the_repository() -> None:
    found = []
    for path in files():
        if path.suffix in TEXT_SUFFIXES and path.stat().st_size < 2_000_000:
            for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
                if FORBIDDEN.search(line):
                    found.append(f"{relative(path)}:{number}: {line.strip()[:100]}")
    assert found == []


def test_the_word_guard_sees() -> None:
    assert FORBIDDEN.search("see ../sha" + "red/DESIGN.md")
    assert not FORBIDDEN.search("a shared expert works/fails")


def test_constraints_are_exact_and_portable() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not EXACT_PIN.fullmatch(line)] == []


def test_every_dependency_is_pinned_within_its_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = {canonicalize_name(name): version for name, version in _pins().items()}
    for text in project["dependencies"] + project["optional-dependencies"]["test"]:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{text} has no version in constraints.txt"
        assert requirement.specifier.contains(pins[name]), f"{text} excludes {pins[name]} of constraints.txt"


def test_extras_are_the_promised_ones() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"test", "gpu", "xgrammar"} <= set(project["optional-dependencies"])


@pytest.mark.parametrize(
    "target", "setup demo serve test test-full lint type fmt protos bench bench-roof bench-peers bench-models".split()
)
def test_make_has_the_promised_target(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def _listed(text: str, top: str) -> set[str]:
    """Paths below ``top`` that the document names in backticks or in a tree."""
    return {path.rstrip("/") for path in re.findall(rf"\b{top}/[\w/.-]*\w/?", text)}


@pytest.mark.parametrize("top", ["cluster", "engine"])
def test_architecture_document_lists_exactly_what_exists(top: str) -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    entries = [path for path in (ROOT / top).iterdir() if path.name not in ("__init__.py", "__pycache__")]
    expected = {relative(path) for path in entries if path.is_dir() or path.suffix == ".py"}
    listed = _listed(text, top)
    assert expected - listed == set(), "docs/architecture.md does not name these"
    assert [path for path in sorted(listed) if not _exists(path)] == [], "docs/architecture.md names what is not there"


def _exists(path: str) -> bool:
    """A file or folder, or a module written without its suffix."""
    return (ROOT / path).exists() or (ROOT / f"{path}.py").exists()


def test_data_folders_say_where_their_files_come_from() -> None:
    folders = [path for path in (ROOT / "tests" / "data").iterdir() if path.is_dir()]
    assert [relative(Path(folder)) for folder in folders if not (folder / "SOURCES.md").exists()] == []
