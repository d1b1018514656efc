"""Bodies of Anthropic's requests. Wrong types are refused, unknown fields are not looked at, and fields that ask for
what is not served are refused rather than ignored.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from cluster.frontend.openai_schema import MAX_MESSAGES, Body
from engine.errors import InvalidRequest

_NOT_SERVED = {"container": "containers", "mcp_servers": "connecting to MCP servers", "prefill": "a begun answer"}


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", frozen=True)


Blocks = Annotated[list[dict[str, Any]], Field(fail_fast=True)]


class Message(_Part):
    """One turn: text, or blocks of which text, tools and their results are served."""

    role: Literal["user", "assistant", "system"]
    content: str | Blocks


class Tool(_Part):
    """A tool that the client carries out. ``type`` names those that a server would: they are not served."""

    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    type: str | None = None
    strict: bool | None = None


class ToolChoice(_Part):
    """Which tools the answer may or must call."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Thinking(_Part):
    type: str


class Format(_Part):
    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(_Part):
    format: Format | None = None


class CountBody(Body):
    """POST /v1/messages/count_tokens."""

    model: str = Field(min_length=1)
    messages: Annotated[list[Message], Field(max_length=MAX_MESSAGES, fail_fast=True)]
    system: str | Blocks | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None

    def refuse_what_is_not_served(self) -> None:
        """Raises InvalidRequest."""
        for name, what in _NOT_SERVED.items():
            if (self.model_extra or {}).get(name):
                raise InvalidRequest(f"{what} is not served; leave {name} out", name)


class MessagesBody(CountBody):
    """POST /v1/messages."""

    max_tokens: int
    stream: bool | None = None
    stop_sequences: Annotated[list[str], Field(fail_fast=True)] | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
