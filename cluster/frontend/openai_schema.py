"""Bodies of OpenAI's requests, with the extensions that vLLM's clients know.

Wrong types are refused, unknown fields are not looked at, and fields that ask for what is not served are refused rather
than ignored.
"""

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from cluster.frontend.calls import (
    ChatPrompt,
    Prompt,
    SamplingOptions,
    StructuredOutput,
    TextPrompt,
    TimeLimits,
    TokenPrompt,
)
from cluster.frontend.structured import GUIDED_FIELDS, forced_call, structured_output
from cluster.frontend.tools.request import is_forced, offered_tools, past_calls
from engine.errors import InvalidRequest

# Field → what is not served yet. Null, false, zero and empty values ask for nothing.
_NOT_SERVED = {
    "tools": "tool calling outside of chats",
    "audio": "audio",
    "use_beam_search": "beam search",
    "prompt_embeds": "prompt embeddings",
    "chat_template": "a template of the client's own",
    "continue_final_message": "continuing the last message",
}


MAX_PROMPTS = 1024
MAX_MESSAGES = 4096
MAX_IDS = 2_500_000
_TOKEN_ID = re.compile("[0-9]{1,10}")

# Checked by hand, because they may be very long or their errors need other words than a union's.
_STRINGS = {"type": "array", "items": {"type": "string"}, "minItems": 1}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_ID_LISTS = {"type": "array", "items": _IDS, "minItems": 1}
PROMPT_SCHEMA = {"anyOf": [{"type": "string", "minLength": 1}, _STRINGS, _IDS, _ID_LISTS]}
_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_INPUT = {"anyOf": [{"type": "string"}, _STRINGS, {"type": "array", "items": _PART, "minItems": 1}]}


class Body(BaseModel):
    """What all have."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False, protected_namespaces=())

    max_values: ClassVar[int] = 200_000
    """How many numbers, strings and the like a body of this kind may hold."""

    model: str = ""


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)

    include_usage: bool = False


class _GenerateBody(Body):
    """What both generating endpoints take."""

    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop_token_ids: Annotated[list[int], Field(fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None
    response_format: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(fail_fast=True)] | None = None
    guided_grammar: str | None = None
    structured_outputs: dict[str, Any] | None = None
    timeout_s: float | None = None
    queue_timeout_s: float | None = None
    first_token_timeout_s: float | None = None
    priority: int | None = None
    cache_salt: str | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def limits(self) -> TimeLimits:
        return TimeLimits(self.timeout_s, self.queue_timeout_s, self.first_token_timeout_s)

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def refuse_what_is_not_served(self) -> None:
        """Raises InvalidRequest."""
        for name, what in _NOT_SERVED.items():
            if (self.model_extra or {}).get(name):
                raise InvalidRequest(f"{what} is not served yet; leave {name} out", name)
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options is only for requests with stream: true", "stream_options")

    def options(self, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None) -> SamplingOptions:
        return SamplingOptions(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=_biases(self.logit_bias or {}),
            seed=self.seed,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            structured=self.structured(),
        )

    def structured(self) -> StructuredOutput | None:
        """Raises InvalidRequest."""
        guided = {name: getattr(self, name) for name in GUIDED_FIELDS}
        return structured_output(self.response_format, guided, self.structured_outputs)


def _biases(given: Mapping[str, float]) -> dict[int, float]:
    # int() takes more than JSON's writers of numbers mean: spaces, underscores, other scripts' digits.
    if not all(_TOKEN_ID.fullmatch(token_id) for token_id in given):
        raise InvalidRequest("the keys of logit_bias must be token ids", "logit_bias")
    return {int(token_id): bias for token_id, bias in given.items()}


class CompletionBody(_GenerateBody):
    """POST /v1/completions."""

    max_values: ClassVar[int] = MAX_IDS

    prompt: Annotated[Any, WithJsonSchema(PROMPT_SCHEMA)] = None
    suffix: str | None = None
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    add_special_tokens: bool = True
    parse_special_tokens: bool = False

    def prompts(self) -> list[Prompt]:
        """Raises InvalidRequest unless it is a string, strings, token ids or lists of them."""
        given = self.prompt
        if self.suffix and isinstance(given, list) and not all(isinstance(entry, str) for entry in given):
            raise InvalidRequest("suffix needs a prompt of text, not of token ids", "suffix")
        return prompts_of(given, "prompt", MAX_PROMPTS, self._text)

    def _text(self, text: str) -> TextPrompt:
        if not text and not self.suffix:
            raise InvalidRequest("prompt must not be empty", "prompt")
        if self.suffix and (self.echo or self.parse_special_tokens):
            what = "echo" if self.echo else "parse_special_tokens"
            raise InvalidRequest(f"{what} cannot be combined with suffix; leave one of them out", what)
        return TextPrompt(text, self.add_special_tokens, self.parse_special_tokens, self.suffix or "")


def prompts_of(given: Any, param: str, most: int, text: Callable[[str], TextPrompt]) -> list[Prompt]:
    """At most so many. ``text``: makes a prompt of a string. Raises InvalidRequest."""
    if isinstance(given, str):
        return [text(given)]
    if isinstance(given, list) and given:
        if _are_ids(given):
            return [TokenPrompt(given)]
        if len(given) > most:
            raise InvalidRequest(f"{param} may be a list of {most} prompts, not {len(given)}", param)
        if all(isinstance(entry, str) for entry in given):
            return [text(entry) for entry in given]
        if all(isinstance(entry, list) and _are_ids(entry) for entry in given):
            return [TokenPrompt(entry) for entry in given]
    what = "missing" if given is None else "an empty list" if given == [] else "neither"
    raise InvalidRequest(
        f"{param} must be a string, a list of strings, a list of token ids or a list of such lists; it is {what}", param
    )


def _are_ids(entries: list[Any]) -> bool:
    # Often a hundred thousand of them: no loop of ours.
    return set(map(type, entries)) <= {int}


class Message(BaseModel):
    """One turn. ``content`` is text, or parts of which only text is served."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    role: str
    content: str | list[dict[str, Any]] | None = None

    def for_template(self, position: int) -> dict[str, Any]:
        """Raises InvalidRequest for images and other media."""
        # Clients write null for what is not there; templates ask whether a name is there.
        more = {name: value for name, value in (self.model_extra or {}).items() if value is not None}
        if more.get("function_call") or self.role == "function":
            raise InvalidRequest(
                "function_call and the role function are the old form; write tool_calls and the role tool",
                f"messages.{position}",
            )
        if calls := past_calls(more.pop("tool_calls", []), f"messages.{position}.tool_calls"):
            more["tool_calls"] = calls
        # OpenAI's newer name for the same thing; templates know the older one.
        role = "system" if self.role == "developer" else self.role
        content = (
            self.content
            if isinstance(self.content, str)
            else _text_of(self.content or [], f"messages.{position}.content")
        )
        return {"role": role, "content": content, **more}


Messages = Annotated[list[Message], Field(max_length=MAX_MESSAGES, fail_fast=True)]

_MEDIA = {
    "image_url": "images",
    "input_image": "images",
    "input_audio": "audio",
    "video_url": "videos",
    "file": "files",
}


def _text_of(parts: list[dict[str, Any]], where: str) -> str:
    texts = []
    for number, part in enumerate(parts):
        param = f"{where}.{number}"
        kind = part.get("type")
        if isinstance(kind, str) and kind in _MEDIA:
            raise InvalidRequest(f"{_MEDIA[kind]} are not served yet; send text only", param)
        if kind != "text" or not isinstance(part.get("text"), str):
            raise InvalidRequest("a content part must have the type text and a string named text", param)
        texts.append(part["text"])
    return "\n".join(texts)


def chat_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """What templates are given. Raises InvalidRequest."""
    if not messages:
        raise InvalidRequest("messages must not be empty", "messages")
    return [message.for_template(position) for position, message in enumerate(messages)]


class ChatBody(_GenerateBody):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool = True
    add_special_tokens: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    def refuse_what_is_not_served(self) -> None:
        """Raises InvalidRequest."""
        super().refuse_what_is_not_served()
        for name in ("functions", "function_call"):
            if (self.model_extra or {}).get(name):
                raise InvalidRequest(f"{name} is the old form of tool calling; use tools and tool_choice", name)

    def chat_prompt(self) -> ChatPrompt:
        """Raises InvalidRequest."""
        return ChatPrompt(
            chat_messages(self.messages),
            self.add_generation_prompt,
            self.chat_template_kwargs or {},
            self.add_special_tokens,
            offered_tools(self.tools, self.tool_choice),
        )

    def structured(self) -> StructuredOutput | None:
        """Raises InvalidRequest."""
        asked = super().structured()
        tools = offered_tools(self.tools, self.tool_choice)
        if asked is not None and tools:
            raise InvalidRequest(
                f"{asked.param} and tools cannot both shape the answer; leave one out, or set tool_choice to none",
                asked.param,
            )
        return forced_call(tools) if is_forced(self.tool_choice) else asked

    def num_logprobs(self) -> int | None:
        if self.logprobs:
            return self.top_logprobs or 0
        if self.top_logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true", "top_logprobs")
        return None


class TokenizeBody(Body):
    """POST /tokenize: a prompt, or messages."""

    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    parse_special_tokens: bool = False
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None

    def as_prompt(self) -> Prompt:
        """Raises InvalidRequest."""
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("give either prompt or messages", "prompt")
        if self.messages is not None:
            variables = self.chat_template_kwargs or {}
            messages = chat_messages(self.messages)
            tools = offered_tools(self.tools, None)
            return ChatPrompt(messages, self.add_generation_prompt, variables, bool(self.add_special_tokens), tools)
        assert self.prompt is not None
        return TextPrompt(self.prompt, self.add_special_tokens is not False, self.parse_special_tokens)


class LoadAdapterBody(Body):
    """POST /v1/load_lora_adapter, as vLLM has it."""

    lora_name: str
    lora_path: str


class UnloadAdapterBody(Body):
    """POST /v1/unload_lora_adapter, as vLLM has it."""

    lora_name: str


class ModerationBody(Body):
    """POST /v1/moderations."""

    input: Annotated[Any, WithJsonSchema(_INPUT)] = None

    def texts(self) -> list[str]:
        """One per result: each string is an input, and so is a list of parts. Raises InvalidRequest."""
        given = self.input
        if isinstance(given, str):
            return [given]
        if isinstance(given, list) and 0 < len(given) <= MAX_PROMPTS:
            if all(isinstance(entry, str) for entry in given):
                return list(given)
            if all(isinstance(entry, dict) for entry in given):
                return [_text_of(given, "input")]
        raise InvalidRequest(f"input must be a string, or a list of 1 to {MAX_PROMPTS} strings or text parts", "input")


class DetokenizeBody(Body):
    """POST /detokenize."""

    max_values: ClassVar[int] = MAX_IDS

    tokens: Annotated[list[int], Field(fail_fast=True)]
