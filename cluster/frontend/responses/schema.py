"""Bodies of the Responses API. Wrong types are refused, unknown fields are not looked at, and fields that ask for what
is not served are refused rather than ignored.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from cluster.frontend.calls import StructuredOutput
from cluster.frontend.openai_schema import MAX_MESSAGES, Body
from cluster.frontend.structured import json_schema_output
from engine.errors import InvalidRequest

_NOT_SERVED = {
    "conversation": "conversations; use previous_response_id",
    "prompt": "stored prompts",
    "context_management": "shortening a conversation",
    "moderation": "moderation beside an answer; use /v1/moderations",
}
_LOGPROBS = "message.output_text.logprobs"

Items = Annotated[list[dict[str, Any]], Field(max_length=MAX_MESSAGES, fail_fast=True)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", frozen=True)


class Format(_Part):
    """What the text must follow."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")


class TextConfig(_Part):
    format: Format | None = None


class Reasoning(_Part):
    effort: str | None = None


class CreateBody(Body):
    """POST /v1/responses."""

    model: str = ""
    input: str | Items
    instructions: str | None = None
    previous_response_id: str | None = None
    stream: bool | None = None
    store: bool | None = None
    background: bool | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    include: Annotated[list[str], Field(fail_fast=True)] | None = None
    text: TextConfig | None = None
    tools: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    reasoning: Reasoning | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None

    @property
    def is_stored(self) -> bool:
        """Unlike chats, unless the client says no."""
        return self.store is not False

    def refuse_what_is_not_served(self) -> None:
        """Raises InvalidRequest."""
        for name, what in _NOT_SERVED.items():
            if (self.model_extra or {}).get(name):
                raise InvalidRequest(f"not served: {what}; leave {name} out", name)
        if self.truncation == "auto":
            raise InvalidRequest("the conversation is never cut; set truncation to disabled", "truncation")
        if self.background and not self.is_stored:
            raise InvalidRequest("a response in the background must be stored; leave store out", "background")

    def num_logprobs(self) -> int | None:
        if self.top_logprobs is None and _LOGPROBS not in (self.include or ()):
            return None
        return self.top_logprobs or 0

    def structured(self) -> StructuredOutput | None:
        """Raises InvalidRequest."""
        asked = None if self.text is None else self.text.format
        if asked is None or asked.type == "text":
            return None
        if asked.type == "json_object":
            return json_schema_output({"type": "object"}, "text.format")
        if asked.json_schema is None:
            raise InvalidRequest("text.format.schema is missing", "text.format.schema")
        return json_schema_output(asked.json_schema, "text.format.schema")
