"""Objects against Kubernetes' own schemas and those of custom resources, unknown fields refused.

What this does not see, and nothing here does: CEL rules, defaults, admission, quotas, RBAC, whether an image exists.
"""

import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jsonschema_rs import Draft202012Validator, Registry
from kubernetes_validate.utils import all_versions, major_minor

from tests.chart.rendering import Document

CRDS = Path(__file__).parents[1] / "data" / "crds"
OLDEST = "1.30"
"""As Chart.yaml's kubeVersion; a test compares."""
_METADATA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 253, "pattern": r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"},
        "labels": {
            "type": "object",
            "additionalProperties": {"type": "string", "maxLength": 63, "pattern": r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$"},
        },
        "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
    },
    "required": ["name"],
    "additionalProperties": False,
}


@cache
def versions() -> tuple[str, str]:
    """The oldest and the newest Kubernetes that objects are checked for."""
    return OLDEST, major_minor(all_versions()[-1])


def problems(document: Document, version: str) -> list[str]:
    """What is wrong with an object, each with its path; of the same object it is computed once."""
    return list(_problems(json.dumps(document, sort_keys=True), version))


@cache
def _problems(text: str, version: str) -> tuple[str, ...]:
    document = json.loads(text)
    group = document["apiVersion"].rpartition("/")[0]
    is_custom = (group, document["kind"]) in _custom_kinds()
    validator = _custom_validator(group, document["kind"]) if is_custom else _builtin_validator(version, document)
    found = [f"{_path(error.instance_path)}: {error.message[:300]}" for error in validator.iter_errors(document)]
    metadata = _metadata_validator().iter_errors(document["metadata"])
    return (*found, *(f"metadata: {error.message[:300]}" for error in metadata))


def _path(parts: list[Any]) -> str:
    return ".".join(str(part) for part in parts)


@cache
def _metadata_validator() -> Draft202012Validator:
    return Draft202012Validator(_METADATA)


@cache
def _custom_kinds() -> dict[tuple[str, str], Document]:
    found = [json.loads(path.read_text()) for path in sorted(CRDS.glob("*.json"))]
    return {(one["group"], one["kind"]): one for one in found}


@cache
def _custom_validator(group: str, kind: str) -> Draft202012Validator:
    definition = _custom_kinds()[group, kind]
    schema = closed(definition["schema"])
    schema["properties"]["apiVersion"] = {"const": f"{group}/{definition['version']}"}
    schema["properties"]["kind"] = {"const": kind}
    schema["properties"]["metadata"] = {"type": "object"}
    return Draft202012Validator(schema)


def closed(schema: Any) -> Any:
    """A structural schema of a CustomResourceDefinition as JSON Schema that refuses fields it does not name: an API
    server would drop them, and what was meant would silently not happen."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    if schema.get("x-kubernetes-int-or-string"):
        result.pop("type", None)
        result.setdefault("anyOf", [{"type": "integer"}, {"type": "string"}])
    if isinstance(schema.get("properties"), dict):
        result["properties"] = {name: closed(value) for name, value in schema["properties"].items()}
        if schema.get("type") == "object" and not schema.get("x-kubernetes-preserve-unknown-fields"):
            result.setdefault("additionalProperties", False)
    if schema.get("nullable") and isinstance(result.get("type"), str):
        result["type"] = [result["type"], "null"]
    return result


@cache
def _folder(version: str) -> Any:
    full = next(one for one in all_versions() if major_minor(one) == version)
    return files("kubernetes_validate").joinpath(f"kubernetes-json-schema/v{full}-local-strict")


@cache
def _definitions(version: str) -> Registry:
    content = json.loads(_folder(version).joinpath("_definitions.json").read_text())
    return Registry([(content["$id"], content)])


@cache
def _named_validator(version: str, name: str) -> Draft202012Validator:
    schema = json.loads(_folder(version).joinpath(name).read_text())
    return Draft202012Validator(schema, registry=_definitions(version))


def _builtin_validator(version: str, document: Document) -> Draft202012Validator:
    group, _, api = document["apiVersion"].rpartition("/")
    prefix = f"{group.partition('.')[0]}-" if group else ""
    return _named_validator(version, f"{document['kind'].lower()}-{prefix}{api}.json")
