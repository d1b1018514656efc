"""What a caller asks of the engine: one sequence to continue, or to embed.

A client's request with n choices becomes n of these, alike but for ``choice`` (and so for their random numbers).
"""

import enum

import msgspec

from engine.errors import InvalidRequest
from engine.timeline import Waits

MAX_LOGPROBS = 20
"""Most alternatives per position that a client may ask for (OpenAI's own bound)."""


MAX_STOP_TOKEN_IDS = 256
MAX_LOGIT_BIAS = 1024
"""These travel to every rank and are looked at in every step, so a client may not name without end."""
MAX_GRAMMAR_CHARS = 65_536
MAX_TENANT_CHARS = 128
MAX_TENANT_PRIORITY = 100
MIN_TENANT_WEIGHT = 0.01
MAX_TENANT_WEIGHT = 100.0
MIN_TEMPERATURE = 1e-5
"""Below it a token is chosen greedily: in float32 the division would leave nothing else, or nothing at all."""


class FinishReason(enum.StrEnum):
    """Why a sequence ended. Exactly one per sequence."""

    STOP = "stop"
    """An end-of-sequence or stop token, or (seen by the front end) a stop string."""
    LENGTH = "length"
    """``max_tokens`` or the context's end."""
    ABORT = "abort"
    """Cancelled by its caller, or its deadline passed."""
    ERROR = "error"
    """The engine could not go on with it."""


class Pooling(enum.StrEnum):
    """Which of a prompt's hidden states, as they are after the final norm, make its embedding."""

    LAST = "last"
    """The last position's, which alone has seen the whole prompt."""
    MEAN = "mean"
    """All positions' mean."""


class GrammarKind(enum.StrEnum):
    """The language in which a grammar is written."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    """Of the whole text; in the syntax of Rust's regex crate, without look-around and back-references."""
    LARK = "lark"
    """As llguidance has it."""
    GBNF = "gbnf"
    """llama.cpp's EBNF."""


class Grammar(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What the generated text must follow to its end."""

    kind: GrammarKind
    text: str


class SamplingParams(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How the next tokens are chosen. The wire form is an array: new fields go to the end, with defaults.

    ``seed`` is always set: where a client names none, admission draws one, so that a stream can be resumed anywhere.
    ``stop_token_ids`` holds all ids that end the sequence, the model's own end tokens included unless the client said
    ``ignore_eos``. ``logprobs`` is None for none, else the number of alternatives (0: the sampled token's alone).
    """

    max_tokens: int
    seed: int = 0
    choice: int = 0
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    """0 keeps all."""
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    """A stop token is possible exactly where the grammar may end, and it alone where nothing else is possible, whatever
    ``min_tokens`` is."""
    pooling: Pooling | None = None
    """Instead of tokens the request gets its prompt's embedding; ``max_tokens`` is 0 then, and only then."""

    @property
    def needs_all_positions(self) -> bool:
        """Whether the hidden states of every position are wanted, so that none can be had from the prefix cache."""
        return self.prompt_logprobs is not None or self.pooling is Pooling.MEAN

    def validate(self, vocab_size: int) -> None:
        """Raises InvalidRequest, naming the field, where a value is outside its range."""
        if self.pooling is None:
            _check_range("max_tokens", self.max_tokens, 1, None)
        else:
            self._validate_pooling()
        _check_range("min_tokens", self.min_tokens, 0, self.max_tokens)
        _check_range("seed", self.seed, -(2**63), 2**63 - 1)
        _check_range("temperature", self.temperature, 0.0, 100.0)
        _check_range("top_k", self.top_k, 0, 2**31 - 1)
        _check_range("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise InvalidRequest("top_p must be above 0 and at most 1, not 0; use temperature=0 for greedy", "top_p")
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_range("repetition_penalty", self.repetition_penalty, 1e-3, 100.0)
        for name in ("logprobs", "prompt_logprobs"):
            if (count := getattr(self, name)) is not None:
                _check_range(name, count, 0, MAX_LOGPROBS)
        _check_count("stop_token_ids", len(self.stop_token_ids), MAX_STOP_TOKEN_IDS)
        _check_count("logit_bias", len(self.logit_bias), MAX_LOGIT_BIAS)
        for token_id, bias in self.logit_bias.items():
            if not 0 <= token_id < vocab_size:
                raise InvalidRequest(
                    f"logit_bias names token {token_id}; this model's tokens are 0 to {vocab_size - 1}", "logit_bias"
                )
            _check_range("logit_bias", bias, -100.0, 100.0)
        if self.grammar is not None:
            if (size := len(self.grammar.text)) > MAX_GRAMMAR_CHARS:
                raise InvalidRequest(f"a grammar may have {MAX_GRAMMAR_CHARS} characters, not {size}", "grammar")
            if not self.stop_token_ids:
                raise InvalidRequest(
                    "structured output ends with an end token; leave ignore_eos out, or name stop_token_ids",
                    "ignore_eos",
                )

    def _validate_pooling(self) -> None:
        _check_range("max_tokens", self.max_tokens, 0, 0)
        for name in ("logprobs", "prompt_logprobs", "grammar"):
            if getattr(self, name) is not None:
                raise InvalidRequest(f"an embedding has no tokens; leave {name} out", name)


def _check_count(name: str, count: int, most: int) -> None:
    if count > most:
        raise InvalidRequest(f"{name} has {count} entries; at most {most} are allowed", name)


def _check_range(name: str, value: float, low: float | None, high: float | None) -> None:
    """NaN fails every comparison, so it is refused as well."""
    if (low is None or value >= low) and (high is None or value <= high):
        return
    bounds = f"at least {low}" if high is None else f"from {low} to {high}"
    raise InvalidRequest(f"{name} must be {bounds}, not {value}", name)


class Tenant(msgspec.Struct, frozen=True, gc=False):
    """On whose behalf a request runs. Among tenants of one ``priority`` the tokens of a busy engine are shared by
    ``weight``; those of a lower number go first. A request's own priority orders only its tenant's requests."""

    name: str = ""
    weight: float = 1.0
    priority: int = 0

    def validate(self) -> None:
        """Raises InvalidRequest."""
        if len(self.name) > MAX_TENANT_CHARS:
            raise InvalidRequest(
                f"a tenant's name may have {MAX_TENANT_CHARS} characters, not {len(self.name)}", "tenant"
            )
        _check_range("tenant.weight", self.weight, MIN_TENANT_WEIGHT, MAX_TENANT_WEIGHT)
        _check_range("tenant.priority", self.priority, -MAX_TENANT_PRIORITY, MAX_TENANT_PRIORITY)


NO_TENANT = Tenant()


class Request(msgspec.Struct, frozen=True, gc=False):
    """One sequence to continue, or to embed.

    ``request_id`` is unique among the live requests of an engine. ``token_ids`` is the prompt followed by what has
    been generated already (after a failover); the first ``num_prompt_tokens`` of it are the prompt.
    """

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    priority: int = 0
    """Lower goes first."""
    adapter: str = ""
    """Name of a loaded LoRA adapter; empty for the base model."""
    cache_salt: str = ""
    """Requests with different ones share no cached prefix (vLLM's field)."""
    tenant: Tenant = NO_TENANT
    trace: str = ""
    """W3C ``traceparent`` of whoever asks for it; empty where nobody traces it."""


class AdapterInfo(msgspec.Struct, frozen=True, gc=False):
    """A loaded LoRA adapter: the directory it came from, and the bytes that all ranks together hold for it."""

    name: str
    path: str
    num_bytes: int = 0


class TopLogprobs(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Log-probabilities (natural) at one position, before temperature and truncation, after penalties and bias.

    ``logprob`` and ``rank`` (1 = most likely) are the chosen token's; the lists are the most likely tokens, best first.
    """

    logprob: float
    rank: int
    token_ids: list[int]
    logprobs: list[float]


class Output(msgspec.Struct, frozen=True, gc=False):
    """What one step gave one request: zero or more tokens, and the end if it is the last.

    ``prompt_logprobs`` are appended chunk by chunk while the prompt is prefilled; the entry of the first prompt token
    is None. ``num_cached_tokens`` counts prompt tokens served from the prefix cache. ``waits`` comes once, about when
    the first token does.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    logprobs: list[TopLogprobs] | None = None
    prompt_logprobs: list[TopLogprobs | None] | None = None
    num_cached_tokens: int = 0
    error: str | None = None
    waits: Waits | None = None
    pooled: bytes | None = None
    """With the end of a request that wanted it: its embedding, [hidden_size] float32 of length 1, little-endian."""
