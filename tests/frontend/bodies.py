"""Bodies of requests, and streams taken apart."""

import json
from typing import Any

EOT = 2036
USER = [{"role": "user", "content": "Hi"}]
CONVERSATION = """{{ bos_token }}
{%- for tool in tools or [] %}{{ tool.function.name }}
{% endfor %}
{%- for message in messages -%}
{{ message.role }}: {{ message.content }}
{% for call in message.tool_calls or [] %}{{ call.function | tojson }}
{% endfor %}
{%- endfor %}"""
"""A chat template that takes everything: several calls at once, and results in any order."""


def chat(**changes: Any) -> dict[str, Any]:
    return {"model": "m", "messages": USER, **changes}


def completion(**changes: Any) -> dict[str, Any]:
    return {"model": "m", "prompt": "Hello", **changes}


def events_of(body: str) -> list[Any]:
    """The data of each event; comments and every malformed line are the test's business."""
    blocks = body.split("\n\n")
    assert blocks.pop() == ""
    datas = [block.removeprefix("data: ") for block in blocks if not block.startswith(":")]
    assert all(block.startswith(("data: ", ": ")) and "\n" not in block for block in blocks)
    assert datas[-1] == "[DONE]"
    return [json.loads(data) for data in datas[:-1]]
