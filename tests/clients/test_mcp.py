"""The loop of an agent: an MCP server offers a tool, the model is made to call it, and hears what came of it."""

import json
import sys
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from mcp import Client, StdioServerParameters, stdio_client

from tests.clients.chores import MODEL

SERVER = Path(__file__).with_name("mcp_server.py")


def _as_function(tool: Any) -> Any:
    """A tiny model would go on and on with arguments of its own invention where the schema lets it."""
    parameters = {**tool.input_schema, "additionalProperties": False}
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}


@pytest.mark.timeout(60)
async def test_a_tool_of_an_mcp_server_is_called(url: str) -> None:
    http = httpx.AsyncClient(timeout=60, trust_env=False)
    model = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http)
    parameters = StdioServerParameters(command=sys.executable, args=[str(SERVER)])
    async with model, Client(stdio_client(parameters)) as tools:
        offered = [_as_function(tool) for tool in (await tools.list_tools()).tools]
        messages: list[Any] = [{"role": "user", "content": "What is the sum?"}]
        create: Any = model.chat.completions.create
        answer = await create(model=MODEL, messages=messages, tools=offered, tool_choice="required", temperature=0)
        (call,) = answer.choices[0].message.tool_calls
        arguments = json.loads(call.function.arguments)
        result = await tools.call_tool(call.function.name, arguments)
        said: Any = result.content[0]
        assert said.text == f"{arguments['a']} + {arguments['b']} = {arguments['a'] + arguments['b']}"
        messages += [answer.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": said.text}]
        last = await create(model=MODEL, messages=messages, tools=offered, tool_choice="none", max_tokens=8)
        assert last.choices[0].finish_reason in ("stop", "length")
        assert last.usage.prompt_tokens > answer.usage.prompt_tokens
