"""The tail is guarded: no file over 400 lines, no function over 60. Exceptions may only shrink."""

import ast
from pathlib import Path

from tests.architecture.source_tree import ROOT, python_files, relative

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
# One exception a line: "path number-of-lines" or "path::function number-of-lines".
EXCEPTIONS = Path(__file__).with_name("size_exceptions.txt")


def sizes_over_the_limit(name: str, source: str) -> dict[str, int]:
    """Lines of the file and of each of its functions, where they are over the limits."""
    over = {}
    lines = source.count("\n")
    if lines > MAX_FILE_LINES:
        over[name] = lines
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                over[f"{name}::{node.name}"] = lines
    return over


def _exceptions() -> dict[str, int]:
    lines = [line.split() for line in EXCEPTIONS.read_text().splitlines() if line and not line.startswith("#")]
    return {name: int(number) for name, number in lines}


def test_no_file_and_no_function_is_too_long() -> None:
    over: dict[str, int] = {}
    for path in python_files():
        over |= sizes_over_the_limit(relative(path), path.read_text())
    assert over == _exceptions(), f"split what is too long; {relative(EXCEPTIONS)} holds exact sizes and only shrinks"


def test_the_guard_counts_lines() -> None:
    function = "def long():\n" + "    pass\n" * MAX_FUNCTION_LINES
    assert sizes_over_the_limit("a.py", function) == {"a.py::long": MAX_FUNCTION_LINES + 1}
    assert sizes_over_the_limit("a.py", function.replace("    pass\n", "", 1)) == {}
    assert sizes_over_the_limit("a.py", "x = 1\n" * (MAX_FILE_LINES + 1)) == {"a.py": MAX_FILE_LINES + 1}
    assert sizes_over_the_limit("a.py", "x = 1\n" * MAX_FILE_LINES) == {}


def test_the_tree_that_is_guarded_is_the_real_one() -> None:
    assert (ROOT / "pyproject.toml").exists()
    assert len(list(python_files("engine"))) > 10
