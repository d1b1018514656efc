"""llama-stack-client's inference, as far as this version speaks OpenAI's API: below /v1/openai/v1."""

import json
import sys

import httpx
from llama_stack_client import LlamaStackClient, NotFoundError

URL = sys.argv[1]
SCHEMA = {
    "type": "object",
    "properties": {"side": {"enum": ["left", "right"]}},
    "required": ["side"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "find", "parameters": SCHEMA}}


def main() -> None:
    http = httpx.Client(timeout=60, trust_env=False)
    client = LlamaStackClient(base_url=URL, http_client=http, max_retries=0)
    asked = {
        "model": "remuda-tiny",
        "messages": [{"role": "user", "content": "Once upon a time"}],
        "max_tokens": 12,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**asked).choices[0].message.content
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert chunks[-1].choices[0].finish_reason, chunks[-1]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text and text == whole, (text, whole)
    assert client.completions.create(model="remuda-tiny", prompt="Once upon", max_tokens=4).choices[0].text
    forced = {**asked, "max_tokens": 400, "tools": [TOOL], "tool_choice": "required"}
    (call,) = client.chat.completions.create(**forced).choices[0].message.tool_calls
    assert call.function.name == "find" and json.loads(call.function.arguments)["side"] in ("left", "right"), call
    try:
        client.chat.completions.create(**{**asked, "model": "other"})
    except NotFoundError as error:
        assert "does not exist" in str(error), error
    else:
        raise AssertionError("an unknown model was served")
    print("passed")


main()
