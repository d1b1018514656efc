"""LlamaIndex's OpenAI-like model: answers, streams, texts and forced calls."""

import sys

# This file has the library's name, and its folder stands first.
sys.path.pop(0)

from typing import Literal

from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from openai import NotFoundError

URL = sys.argv[1]


def find(side: Literal["left", "right"]) -> str:
    """Find it."""
    return side


def main() -> None:
    values = {"model": "remuda-tiny", "api_base": f"{URL}/v1", "api_key": "none", "temperature": 0.0, "max_retries": 0}
    model = OpenAILike(**values, max_tokens=12, is_chat_model=True, is_function_calling_model=True)
    question = [ChatMessage(role="user", content="Once upon a time")]
    whole = model.chat(question).message.content
    pieces = [piece.delta or "" for piece in model.stream_chat(question)]
    assert whole and "".join(pieces) == whole, (whole, pieces)
    plain = OpenAILike(**values, max_tokens=8, is_chat_model=False)
    assert plain.complete("Once upon").text
    caller = OpenAILike(**values, max_tokens=400, is_chat_model=True, is_function_calling_model=True)
    tool = FunctionTool.from_defaults(find)
    answer = caller.chat_with_tools([tool], "Where?", tool_required=True)
    calls = caller.get_tool_calls_from_response(answer)
    assert calls[0].tool_name == "find" and calls[0].tool_kwargs["side"] in ("left", "right"), calls
    unknown = OpenAILike(**{**values, "model": "other"}, max_tokens=8, is_chat_model=True)
    try:
        unknown.chat(question)
    except NotFoundError as error:
        assert "does not exist" in str(error), error
    else:
        raise AssertionError("an unknown model was served")
    print("passed")


main()
