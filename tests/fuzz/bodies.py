"""Good bodies for every operation that /openapi.json has: what its schemas ask for, with values that are served."""

import copy
import re
from dataclasses import dataclass
from random import Random
from typing import Any

from cluster.frontend.openapi import openapi_document

MODEL = "remuda-tiny"
_SCHEMA = {"type": "object", "properties": {"side": {"enum": ["left", "right"]}}, "required": ["side"]}
_TOOL = {"type": "function", "function": {"name": "find", "parameters": _SCHEMA}}
_OFTEN = 0.15
"""Of each field that may be left out."""
_LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "num_predict")

USUAL: dict[str, tuple[Any, ...]] = {
    "model": (MODEL,),
    "prompt": ("Hi", "Once upon a time"),
    "messages": (
        [{"role": "user", "content": "Hi"}],
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}],
    ),
    "input": ("Hi", "The herd"),
    "tokens": ([300, 301],),
    "n": (1, 2),
    "best_of": (1,),
    "stop": ("\n", ["a", "b"]),
    "temperature": (0, 0.7),
    "top_p": (1.0, 0.9),
    "top_k": (-1, 5),
    "min_p": (0.0, 0.1),
    "seed": (1, 7),
    "logprobs": (1, True),
    "top_logprobs": (0, 2),
    "logit_bias": ({"300": 1.5},),
    "stop_token_ids": ([301],),
    "response_format": (
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": _SCHEMA}},
    ),
    "guided_json": (_SCHEMA,),
    "guided_regex": ("(left|right)",),
    "guided_choice": (["left", "right"],),
    "guided_grammar": ('root ::= "left"',),
    "structured_outputs": ({"choice": ["a", "b"]},),
    "tools": (
        [_TOOL],
        [{"name": "find", "input_schema": _SCHEMA}],
        [{"type": "function", "name": "find", "parameters": _SCHEMA}],
    ),
    "tool_choice": ("auto", {"type": "auto"}),
    "format": ("json", _SCHEMA),
    "lora_path": ("first",),
    "day": ("2026-01-31",),
    "tenant": ("default",),
    "timeout_s": (20.0,),
    "queue_timeout_s": (20.0,),
    "first_token_timeout_s": (20.0,),
}


@dataclass(frozen=True)
class Operation:
    """``path`` may have names in braces; ``schema``: None where there is no body."""

    method: str
    path: str
    schema: dict[str, Any] | None
    query: tuple[str, ...]


class Bodies:
    """The operations of this software's own document: what is added to it is fuzzed from then on."""

    def __init__(self) -> None:
        self._document = openapi_document("0")
        self.operations = [
            Operation(
                method.upper(),
                path,
                operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema"),
                tuple(each["name"] for each in operation.get("parameters", ()) if each["in"] == "query"),
            )
            for path, operations in self._document["paths"].items()
            for method, operation in operations.items()
        ]
        self.taking_bodies = [operation for operation in self.operations if operation.schema is not None]

    def good(self, operation: Operation, rng: Random, often: float = _OFTEN) -> dict[str, Any]:
        """A body that is a few tokens' work. ``often``: of fields that may be left out."""
        body: dict[str, Any] = self._of(operation.schema or {}, rng, often, 0)
        properties = self._resolved(operation.schema or {}).get("properties", {})
        for name in ("prompt", "messages", "input"):
            if name in properties and not any(given in body for given in ("prompt", "messages", "input")):
                body[name] = copy.deepcopy(rng.choice(USUAL[name]))
        for name in _LENGTHS:
            if name in properties:
                body[name] = rng.randrange(1, 5)
        if "options" in properties:
            body["options"] = {**(body.get("options") or {}), "num_predict": rng.randrange(1, 5)}
        return body

    def _resolved(self, schema: dict[str, Any]) -> dict[str, Any]:
        while (reference := schema.get("$ref")) is not None:
            schema = dict(self._document["components"]["schemas"][reference.rpartition("/")[2]])
        return schema

    def _of(self, schema: dict[str, Any], rng: Random, often: float, depth: int) -> Any:
        schema = self._resolved(schema)
        for union in ("anyOf", "oneOf"):
            if union in schema:
                real = [each for each in schema[union] if each.get("type") != "null"] or schema[union]
                return self._of(rng.choice(real), rng, often, depth)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return rng.choice(schema["enum"])
        kind = schema.get("type")
        if kind == "object":
            return self._object(schema, rng, often, depth)
        if kind == "array":
            number = max(schema.get("minItems", 0), rng.randrange(3) if depth < 4 else 0)
            return [self._of(schema.get("items", {}), rng, often, depth + 1) for _ in range(number)]
        if kind == "string":
            return "a" * max(1, schema.get("minLength", 0))
        return {"integer": rng.randrange(1, 5), "number": 0.5, "boolean": rng.random() < 0.5}.get(kind or "")

    def _object(self, schema: dict[str, Any], rng: Random, often: float, depth: int) -> dict[str, Any]:
        required = schema.get("required", ())
        made = {}
        for name, kind in schema.get("properties", {}).items():
            if name in required or name == "model" or rng.random() < often / (1 + depth):
                made[name] = (
                    copy.deepcopy(rng.choice(USUAL[name])) if name in USUAL else self._of(kind, rng, often, depth + 1)
                )
        return made


def filled(path: str, name: str) -> str:
    """The path with ``name`` for what stands in braces."""
    return re.sub(r"\{[^}]*\}", lambda found: name, path)
