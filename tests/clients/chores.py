"""What every client is asked to do."""

from typing import Any

MODEL = "remuda-tiny"
USER: Any = [{"role": "user", "content": "Once upon a time"}]
PLACE: dict[str, Any] = {
    "type": "object",
    "properties": {"side": {"type": "string", "enum": ["left", "right"]}, "far": {"type": "boolean"}},
    "required": ["side", "far"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "function": {"name": "find", "description": "Find it", "parameters": PLACE}}


def check_place(arguments: Any) -> None:
    """Arguments that the grammar has forced into the tool's schema."""
    assert set(arguments) == {"side", "far"}, arguments
    assert arguments["side"] in ("left", "right") and isinstance(arguments["far"], bool), arguments
