"""helm/remuda/README.md: a table of all values, from values.yaml and the comments above its keys."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import yaml

from tests.chart.rendering import CHART, PRESETS

README = CHART / "README.md"
_BEGIN, _END = "<!-- values: begin -->", "<!-- values: end -->"


@dataclass(frozen=True)
class Value:
    """``default``: as YAML in one line; None of a section, whose keys follow."""

    path: str
    comment: str
    default: str | None


def documented_values(text: str) -> list[Value]:
    """Every key of a values file, in order, with the comment lines that stand directly above it."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)
    return list(_walk(root, (), text.splitlines()))


def _walk(node: yaml.MappingNode, above: tuple[str, ...], lines: Sequence[str]) -> Iterator[Value]:
    for key, value in node.value:
        path = (*above, key.value)
        comment = _comment_above(lines, key.start_mark.line)
        if isinstance(value, yaml.MappingNode) and value.value:
            yield Value(".".join(path), comment, None)
            yield from _walk(value, path, lines)
        else:
            default = "\n".join(lines)[value.start_mark.index : value.end_mark.index]
            yield Value(".".join(path), comment, default)


def _comment_above(lines: Sequence[str], line: int) -> str:
    found: list[str] = []
    while line > 0 and lines[line - 1].strip().startswith("#"):
        line -= 1
        found.append(lines[line].strip().removeprefix("#").strip())
    return " ".join(reversed(found))


def values_table() -> str:
    rows = ["| value | default | |", "|---|---|---|"]
    for value in documented_values((CHART / "values.yaml").read_text()):
        name, comment = f"`{value.path}`", value.comment.replace("|", "\\|")
        if value.default is not None:
            rows.append(f"| {name} | `{value.default}` | {comment} |")
        elif comment:
            rows.append(f"| {name} | | {comment} |")
    return "\n".join(rows)


def presets_table() -> str:
    rows = ["| file | |", "|---|---|"]
    for name in PRESETS:
        lines = (CHART / f"values-{name}.yaml").read_text().splitlines()
        comment = " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))
        rows.append(f"| `values-{name}.yaml` | {comment} |")
    return "\n".join(rows)


def current_readme() -> str:
    """What README.md should be: the text before the mark stays."""
    text = README.read_text()
    head, _, rest = text.partition(_BEGIN)
    _, _, tail = rest.partition(_END)
    return f"{head}{_BEGIN}\n\n## Presets\n\n{presets_table()}\n\n## Values\n\n{values_table()}\n\n{_END}{tail}"
