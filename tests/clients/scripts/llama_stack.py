"""llama-stack-client's inference, as far as this version speaks OpenAI's API: below /v1/openai/v1, which is our /v1.

It takes the data of every event for JSON, also the `[DONE]` that ends OpenAI's streams and that its own server does not
send: so a stream gives all its chunks, and then the library's error.
"""

import json
import sys
from typing import Any

import httpx
from llama_stack_client import LlamaStackClient, NotFoundError

URL = sys.argv[1]


class BelowOpenai(httpx.HTTPTransport):
    """Its paths at ours."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        request.url = request.url.copy_with(path=request.url.path.removeprefix("/v1/openai"))
        return super().handle_request(request)


def streamed(client: LlamaStackClient, **asked: Any) -> list[Any]:
    chunks = []
    try:
        for chunk in client.chat.completions.create(**asked, stream=True):
            chunks.append(chunk)
    except json.JSONDecodeError as error:
        assert error.doc == "[DONE]", error.doc
    return chunks


def main() -> None:
    http = httpx.Client(transport=BelowOpenai(), timeout=60, trust_env=False)
    client = LlamaStackClient(base_url=URL, http_client=http, max_retries=0)
    asked = {
        "model": "remuda-tiny",
        "messages": [{"role": "user", "content": "Once upon a time"}],
        "max_tokens": 12,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**asked).choices[0].message.content
    chunks = streamed(client, **asked)
    assert chunks[-1].choices[0].finish_reason, chunks[-1]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text and text == whole, (text, whole)
    assert client.completions.create(model="remuda-tiny", prompt="Once upon", max_tokens=4).choices[0].text
    try:
        client.chat.completions.create(**{**asked, "model": "other"})
    except NotFoundError as error:
        assert "does not exist" in str(error), error
    else:
        raise AssertionError("an unknown model was served")
    print("passed")


main()
