"""LiteLLM: answers, streams, forced calls and errors over OpenAI's API, and over Anthropic's and Ollama's."""

import json
import os
import sys

# This file has the library's name, and its folder stands first.
sys.path.pop(0)
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm

URL = sys.argv[1]
USER = [{"role": "user", "content": "Once upon a time"}]
SCHEMA = {
    "type": "object",
    "properties": {"side": {"enum": ["left", "right"]}},
    "required": ["side"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "find", "parameters": SCHEMA}}
APIS = {
    "openai/remuda-tiny": {"api_base": f"{URL}/v1", "api_key": "none"},
    "anthropic/remuda-tiny": {"api_base": URL, "api_key": "none"},
    "ollama_chat/remuda-tiny": {"api_base": URL},
}


def main() -> None:
    for model, where in APIS.items():
        asked = {"model": model, "messages": USER, "max_tokens": 12, "temperature": 0, **where}
        whole = litellm.completion(**asked).choices[0].message.content
        chunks = list(litellm.completion(**asked, stream=True))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text and text == whole, (model, text, whole)
        try:
            litellm.completion(**{**asked, "model": model.replace("remuda-tiny", "other")}, num_retries=0)
        except litellm.exceptions.APIError as error:
            assert "does not exist" in str(error), error
        except litellm.exceptions.NotFoundError as error:
            assert "does not exist" in str(error), error
        else:
            raise AssertionError(f"{model}: an unknown model was served")
    for model in ("openai/remuda-tiny", "anthropic/remuda-tiny"):
        answer = litellm.completion(
            model=model, messages=USER, tools=[TOOL], tool_choice="required", max_tokens=400, **APIS[model]
        )
        (call,) = answer.choices[0].message.tool_calls
        assert json.loads(call.function.arguments)["side"] in ("left", "right"), call
    print("passed")


main()
