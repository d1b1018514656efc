"""All mutants that Cosmic Ray makes of the files named, one JSON object per line.

Runs in the tool's own environment (.venv-mutants), which has nothing of the project: it only reads text. Left out is
what is no mutant of what a program does: types, and code that says the same.
"""

import ast
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def _places_of_types(tree: ast.Module) -> set[tuple[int, int]]:
    """(line, column) of all that stands in annotations and in aliases of types."""
    roots: list[ast.AST | None] = []
    for node in ast.walk(tree):
        match node:
            case ast.AnnAssign(annotation=root):
                roots.append(root)
            case ast.arg(annotation=root):
                roots.append(root)
            case ast.FunctionDef(returns=root) | ast.AsyncFunctionDef(returns=root):
                roots.append(root)
    # At a module's top a union can only be one of types.
    roots += [node.value for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.BinOp)]
    return {
        (line, column)
        for root in roots
        if isinstance(root, ast.expr) and root.end_lineno is not None and root.end_col_offset is not None
        for line in range(root.lineno, root.end_lineno + 1)
        for column in range(root.col_offset, root.end_col_offset)
    }


def mutants(path: Path) -> Iterator[dict[str, Any]]:
    """Each: ``file``, ``line``, ``column``, ``operator``, ``occurrence``, ``before`` and ``after`` (lines that differ)
    and ``source`` (of the whole file)."""
    parsing = importlib.import_module("cosmic_ray.ast")
    mutating = importlib.import_module("cosmic_ray.mutating")
    plugins = importlib.import_module("cosmic_ray.plugins")
    source = path.read_text()
    types = _places_of_types(ast.parse(source))
    plain = ast.dump(ast.parse(source))
    for name in sorted(plugins.operator_names()):
        kind = plugins.get_operator(name)
        if kind.arguments():
            continue
        operator = kind()
        nodes = parsing.ast_nodes(parsing.get_ast(source))
        places = [start for node in nodes for start, _ in operator.mutation_positions(node)]
        for occurrence, (line, column) in enumerate(places):
            if (line, column) in types:
                continue
            mutated = mutating.mutate_code(source, operator, occurrence)
            if mutated is None or not _differs(mutated, plain):
                continue
            before, after = _changed_lines(source, mutated)
            yield {
                "file": str(path),
                "line": line,
                "column": column,
                "operator": name.removeprefix("core/"),
                "occurrence": occurrence,
                "before": before,
                "after": after,
                "source": mutated,
            }


def _differs(mutated: str, plain: str) -> bool:
    try:
        return ast.dump(ast.parse(mutated)) != plain
    except SyntaxError:
        return False


def _changed_lines(source: str, mutated: str) -> tuple[str, str]:
    pairs = list(zip(source.splitlines(), mutated.splitlines(), strict=False))
    changed = [(old.strip(), new.strip()) for old, new in pairs if old != new]
    return changed[0] if changed else ("", "")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        for mutant in mutants(Path(argument)):
            print(json.dumps(mutant))
