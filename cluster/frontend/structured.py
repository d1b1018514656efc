"""The fields with which clients ask for structured output → one grammar."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.frontend.calls import StructuredOutput
from engine.errors import InvalidRequest
from engine.request import Grammar, GrammarKind

MAX_CHOICE_STRINGS = 1024

GUIDED_FIELDS = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
_NAMES_IN_OBJECT = {name.removeprefix("guided_"): name for name in (*GUIDED_FIELDS, "json_object")}


def structured_output(
    response_format: Mapping[str, Any] | None, guided: Mapping[str, Any], newer: Mapping[str, Any] | None
) -> StructuredOutput | None:
    """Args:
        response_format: OpenAI's field.
        guided: vLLM's guided_json, guided_regex, guided_choice, guided_grammar, where the client has them.
        newer: vLLM's structured_outputs, an object with the same without ``guided_``.

    Raises:
        InvalidRequest: a field that is not what it should be, or two of them.
    """
    found = [_of_guided(name, value, name) for name, value in guided.items() if value is not None]
    for name, value in (newer or {}).items():
        if value is not None and name not in _NAMES_IN_OBJECT:
            raise InvalidRequest(
                f"structured_outputs.{name} is not served; use one of {', '.join(_NAMES_IN_OBJECT)}",
                f"structured_outputs.{name}",
            )
        if value is not None and value is not False:
            found.append(_of_guided(_NAMES_IN_OBJECT[name], value, f"structured_outputs.{name}"))
    if (wish := _of_response_format(response_format)) is not None:
        found.append(wish)
    if len(found) > 1:
        raise InvalidRequest(f"{found[0].param} and {found[1].param} are both given; leave one out", found[1].param)
    return found[0] if found else None


def forced_call(tools: Sequence[Mapping[str, Any]]) -> StructuredOutput:
    """A call of one of these tools, in Llama 3.1's JSON form."""
    calls, parameters = [], {}
    for tool in tools:
        function = tool["function"]
        name = function["name"]
        # A function without parameters takes none, says OpenAI.
        schema = function.get("parameters") or {"additionalProperties": False}
        parameters[name] = _moved({"type": "object", **schema}, f"#/$defs/{name}")
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": name}, "parameters": {"$ref": f"#/$defs/{name}"}},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    return json_schema_output({"$defs": parameters, "anyOf": calls}, "tools")


def _of_response_format(wish: Mapping[str, Any] | None) -> StructuredOutput | None:
    kind = "text" if wish is None else wish.get("type", "text")
    if wish is None or kind == "text":
        return None
    if kind == "json_object":
        return json_schema_output({"type": "object"}, "response_format")
    if kind != "json_schema":
        raise InvalidRequest(
            f"response_format.type must be text, json_object or json_schema, not {kind!r}", "response_format.type"
        )
    holder = wish.get("json_schema")
    schema = holder.get("schema") if isinstance(holder, Mapping) else None
    if not isinstance(schema, Mapping):
        raise InvalidRequest(
            'response_format must be {"type": "json_schema", "json_schema": {"name": …, "schema": {…}}}',
            "response_format.json_schema.schema",
        )
    return json_schema_output(schema, "response_format.json_schema.schema")


def _of_guided(name: str, value: Any, param: str) -> StructuredOutput:
    if name == "json_object" and value is True:
        return json_schema_output({"type": "object"}, param)
    if name == "guided_json" and isinstance(value, Mapping):
        return json_schema_output(value, param)
    if name == "guided_choice":
        return StructuredOutput(_choice(value, param), param)
    if isinstance(value, str) and value and name in ("guided_json", "guided_regex", "guided_grammar"):
        kinds = {"guided_json": GrammarKind.JSON_SCHEMA, "guided_regex": GrammarKind.REGEX}
        written = GrammarKind.GBNF if "::=" in value else GrammarKind.LARK
        return StructuredOutput(Grammar(kinds.get(name, written), value), param)
    needed = {"guided_json": "a JSON schema", "json_object": "true"}.get(name, "a string that is not empty")
    raise InvalidRequest(f"{param} must be {needed}", param)


def _choice(value: Any, param: str) -> Grammar:
    is_list = isinstance(value, list) and all(isinstance(entry, str) for entry in value)
    if not is_list or not 0 < len(value) <= MAX_CHOICE_STRINGS:
        raise InvalidRequest(f"{param} must be a list of 1 to {MAX_CHOICE_STRINGS} strings", param)
    return Grammar(GrammarKind.LARK, "start: " + " | ".join(json.dumps(entry) for entry in value))


def json_schema_output(schema: Mapping[str, Any], param: str) -> StructuredOutput:
    """A JSON value that the schema allows. Raises InvalidRequest."""
    try:
        text = json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
    except RecursionError as error:
        raise InvalidRequest(f"{param} is nested too deeply", param) from error
    return StructuredOutput(Grammar(GrammarKind.JSON_SCHEMA, text), param)


def _moved(schema: Any, root: str) -> Any:
    """The schema as it reads where its own root is ``root``."""
    if isinstance(schema, Mapping):
        return {
            key: root + value[1:]
            if key == "$ref" and isinstance(value, str) and value[:1] == "#"
            else _moved(value, root)
            for key, value in schema.items()
        }
    return [_moved(entry, root) for entry in schema] if isinstance(schema, list) else schema
