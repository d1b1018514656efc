"""helm/remuda as Helm itself renders it (helm-python-sdk), no cluster needed."""

import copy
import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import helm_python
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "remuda"
RELEASE, NAMESPACE = "demo", "llm"
FULLNAME = "demo-remuda"
PRESETS = ("405b-bf16", "405b-fp8", "maverick-fp8", "70b", "scout", "cpu-demo")

Document = dict[str, Any]
Values = dict[str, Any]

_WORKLOADS = {"Deployment", "Job", "Pod", "LeaderWorkerSet", "RayCluster"}


@cache
def chart() -> helm_python.Chart:
    return helm_python.Chart.load(CHART)


def preset(name: str) -> Values:
    content: Values = yaml.safe_load((CHART / f"values-{name}.yaml").read_text())
    return content


def merged(*parts: Mapping[str, Any]) -> Values:
    """Later ones win, key by key, as Helm merges its files of values."""
    result: Values = {}
    for part in parts:
        for key, value in part.items():
            if isinstance(value, Mapping):
                result[key] = merged(result.get(key) or {}, value)
            else:
                result[key] = copy.deepcopy(value)
    return result


def at(path: str, value: Any) -> Values:
    """``at("engine.hosts", 2)`` → ``{"engine": {"hosts": 2}}``."""
    for key in reversed(path.split(".")):
        value = {key: value}
    return value  # type: ignore[no-any-return]


def render_text(values: Mapping[str, Any]) -> dict[str, str]:
    """File below templates/ → text. Raises helm_python.HelmError."""
    found = chart().render(dict(values), name=RELEASE, namespace=NAMESPACE)
    return {path.removeprefix("remuda/templates/"): text for path, text in found.items()}


def render(values: Mapping[str, Any]) -> list[Document]:
    """All objects, hooks too; for equal values the same ones: copy what you change. Raises helm_python.HelmError."""
    return list(_documents(json.dumps(values, sort_keys=True)))


@cache
def _documents(values: str) -> tuple[Document, ...]:
    texts = render_text(json.loads(values))
    return tuple(
        document
        for path in sorted(texts)
        if path != "NOTES.txt"
        for document in yaml.load_all(texts[path], Loader=yaml.CSafeLoader)
        if document
    )


def of_kind(documents: list[Document], kind: str) -> list[Document]:
    return [document for document in documents if document["kind"] == kind]


def only(documents: list[Document], kind: str, name: str = "") -> Document:
    """The one object of a kind, or of a kind and name without the release's."""
    full = f"{FULLNAME}-{name}" if name else None
    (found,) = [one for one in of_kind(documents, kind) if full is None or one["metadata"]["name"] == full]
    return found


def pod_templates(document: Document) -> Iterator[Document]:
    """Each with ``metadata`` and ``spec``, wherever the kind keeps it."""
    kind, spec = document["kind"], document.get("spec", {})
    if kind == "Pod":
        yield document
    elif kind in ("Deployment", "Job"):
        yield spec["template"]
    elif kind == "LeaderWorkerSet":
        yield spec["leaderWorkerTemplate"]["leaderTemplate"]
        yield spec["leaderWorkerTemplate"]["workerTemplate"]
    elif kind == "RayCluster":
        yield spec["headGroupSpec"]["template"]
        yield from (group["template"] for group in spec.get("workerGroupSpecs", []))
    elif "template" in spec:
        raise AssertionError(f"{kind} has a template that this function does not know; add it to {_WORKLOADS}")


def all_pods(documents: list[Document]) -> list[Document]:
    return [pod for document in documents for pod in pod_templates(document)]


def containers(pod: Document) -> list[Document]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]
