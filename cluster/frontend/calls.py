"""What clients ask for and what they get, the same for HTTP and gRPC."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.request import FinishReason, Grammar, TopLogprobs

MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_CHOICES = 128
MAX_PRIORITY = 2**31 - 1
MAX_CACHE_SALT_CHARS = 256


@dataclass(frozen=True)
class TextPrompt:
    """Text. Control tokens in it are text unless ``parse_special_tokens``. With ``suffix``, what stands between the two
    is asked for.
    """

    text: str
    add_special_tokens: bool = True
    parse_special_tokens: bool = False
    suffix: str = ""


@dataclass(frozen=True)
class TokenPrompt:
    """Token ids, taken as they are."""

    token_ids: Sequence[int]


@dataclass(frozen=True)
class ChatPrompt:
    """Messages for the checkpoint's chat template; ``content`` of each is a string, arguments of calls are mappings."""

    messages: Sequence[Mapping[str, Any]]
    add_generation_prompt: bool = True
    variables: Mapping[str, Any] = field(default_factory=dict)
    add_special_tokens: bool = False
    tools: Sequence[Mapping[str, Any]] = ()


Prompt = TextPrompt | TokenPrompt | ChatPrompt


@dataclass(frozen=True)
class StructuredOutput:
    """What the text must follow, and the field in which the client said so."""

    grammar: Grammar
    param: str


@dataclass(frozen=True)
class SamplingOptions:
    """How a client wants tokens to be chosen. None is the model's or the server's default."""

    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured: StructuredOutput | None = None


@dataclass(frozen=True)
class TimeLimits:
    """Seconds from a request's arrival; None is no limit."""

    total_s: float | None = None
    """Until the whole answer is there."""
    queue_s: float | None = None
    """Until the engine begins with it: its first output, which may hold no token yet."""
    first_token_s: float | None = None

    def within(self, bounds: "TimeLimits") -> "TimeLimits":
        """The tighter of both, each by itself."""
        return TimeLimits(
            _tighter(self.total_s, bounds.total_s),
            _tighter(self.queue_s, bounds.queue_s),
            _tighter(self.first_token_s, bounds.first_token_s),
        )


def _tighter(one: float | None, other: float | None) -> float | None:
    return min((value for value in (one, other) if value is not None), default=None)


@dataclass(frozen=True)
class Call:
    """One client's request: every prompt gets ``n`` choices, numbered prompt by prompt.

    ``default_max_tokens`` holds where the options name no ``max_tokens``, as far as the context has room for it;
    None is the rest of the context. With ``echo``, ``max_tokens`` may be 0: the prompt is scored, nothing generated.
    With ``embeds`` nothing is generated either: each prompt gets its embedding. ``truncates``: one that is longer than
    the context is cut at its end, not refused.
    ``tools`` are the names of what the model may call: its text is parsed for calls of these. ``one_tool_call`` stops a
    choice after its first. ``priority``: lower goes first. ``cache_salt``: of a tenant's calls only those with the same
    one share prefixes.
    """

    request_id: str
    prompts: Sequence[Prompt]
    model: str = ""
    options: SamplingOptions = SamplingOptions()
    n: int = 1
    stop: Sequence[str] = ()
    echo: bool = False
    embeds: bool = False
    truncates: bool = False
    limits: TimeLimits = TimeLimits()
    default_max_tokens: int | None = None
    tools: Sequence[str] = ()
    one_tool_call: bool = False
    priority: int = 0
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class Started:
    """The request was found good and admitted. First event of every stream."""

    model: str
    prompt_token_ids: Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Echo:
    """The prompt, before the first delta of each choice, where the call asked for it.

    ``logprobs`` (None unless asked for) has one entry per prompt token, the first one None. ``text_offsets`` says at
    which character of ``text`` each token begins.
    """

    choice: int
    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[TopLogprobs | None] | None
    text_offsets: Sequence[int]


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """More of one tool call, numbered from 0 in its choice. The first has the name and no arguments; those of all
    others are the text of one JSON object.
    """

    index: int
    name: str | None
    arguments: str


@dataclass(frozen=True, slots=True)
class Delta:
    """More of one choice. ``text`` never ends inside a character; a token whose text is still held back comes later.
    ``tool_calls`` come after the text.

    ``position`` is the first token's, ``text_offsets`` each token's first character, both within the choice; where
    no log-probabilities were asked for, all tokens that came together may have the offset of the first.
    """

    choice: int
    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[TopLogprobs] | None
    position: int
    text_offsets: Sequence[int]
    tool_calls: Sequence[ToolCallDelta] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of one choice, exactly once. ``stop_token_id`` is set where an end or stop token ended it.
    ``calls_tools``: it has tool calls, and each is complete. ``pooled``: the embedding (engine.request.Output).
    """

    choice: int
    reason: FinishReason
    stop_string: str | None = None
    stop_token_id: int | None = None
    calls_tools: bool = False
    pooled: bytes | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Last event of a stream. Prompts count once, whatever ``n``."""

    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int


Event = Started | Echo | Delta | Finished | Usage
