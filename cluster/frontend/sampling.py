"""A client's wishes → the engine's SamplingParams: the checkpoint's defaults, its end tokens, and every bound."""

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.frontend.calls import (
    MAX_CACHE_SALT_CHARS,
    MAX_CHOICES,
    MAX_PRIORITY,
    MAX_STOP_CHARS,
    MAX_STOPS,
    Call,
    SamplingOptions,
)
from engine.errors import ContextLengthExceeded, InvalidRequest
from engine.request import SamplingParams

_OPTIONAL = (
    "min_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)


def build_sampling(
    options: SamplingOptions,
    max_tokens: int,
    seed: int,
    eos_ids: Sequence[int],
    defaults: Mapping[str, float],
    vocab_size: int,
) -> SamplingParams:
    """Choice 0's parameters, validated.

    Args:
        options: what the client said; wins over ``defaults``.
        max_tokens: as ``max_tokens_of`` found it.
        seed: the client's or a drawn one.
        eos_ids: the model's end tokens.
        defaults: the checkpoint's generation_config.json.
        vocab_size: ids must be below it.

    Raises:
        InvalidRequest: a value outside its range; ``param`` names it.
    """
    values: dict[str, Any] = dict(defaults)
    values.update({name: value for name in _OPTIONAL if (value := getattr(options, name)) is not None})
    if values.get("top_k") == -1:
        values["top_k"] = 0
    check_token_ids(options.stop_token_ids, vocab_size, "stop_token_ids")
    ends = [] if options.ignore_eos else list(eos_ids)
    ends = list(dict.fromkeys([*ends, *options.stop_token_ids]))
    sampling = SamplingParams(
        max_tokens=max_tokens,
        seed=seed,
        logit_bias=dict(options.logit_bias),
        stop_token_ids=tuple(ends),
        logprobs=options.logprobs,
        prompt_logprobs=options.prompt_logprobs,
        grammar=options.structured.grammar if options.structured else None,
        **values,
    )
    sampling.validate(vocab_size)
    return sampling


def max_tokens_of(call: Call, num_prompt_tokens: int, max_model_len: int) -> int:
    """How many tokens the engine may generate for a prompt of this length, at least 1.

    Raises:
        ContextLengthExceeded: prompt and requested output together are longer than the model's context.
        InvalidRequest: ``max_tokens`` is out of range.
    """
    room = max_model_len - num_prompt_tokens
    wanted = call.options.max_tokens
    if wanted is None:
        default = room if call.default_max_tokens is None else min(room, call.default_max_tokens)
        wanted, named = max(default, 1), ""
    else:
        if wanted < 0 or (wanted == 0 and not call.echo):
            raise InvalidRequest(f"max_tokens must be at least 1, not {wanted} (0 only with echo)", "max_tokens")
        wanted = max(wanted, 1)
        named = f" ({num_prompt_tokens} in the prompt, {wanted} in the completion)"
    if wanted > room:
        raise ContextLengthExceeded(
            f"this model's maximum context length is {max_model_len} tokens, but {num_prompt_tokens + wanted} were"
            f" requested{named}; shorten the prompt or lower max_tokens"
            if named
            else f"this model's maximum context length is {max_model_len} tokens, but the prompt alone has"
            f" {num_prompt_tokens}, which leaves no room for an answer; shorten it",
            "prompt",
        )
    return wanted


def check_call(call: Call) -> None:
    """The parts of a call that need neither model nor tokenizer. Raises InvalidRequest."""
    if not call.prompts:
        raise InvalidRequest("prompt must not be an empty list", "prompt")
    if not 1 <= call.n <= MAX_CHOICES:
        raise InvalidRequest(f"n must be from 1 to {MAX_CHOICES}, not {call.n}", "n")
    if len(call.stop) > MAX_STOPS:
        raise InvalidRequest(f"stop may hold at most {MAX_STOPS} strings, not {len(call.stop)}", "stop")
    for stop in call.stop:
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise InvalidRequest(f"a stop string must have 1 to {MAX_STOP_CHARS} characters, not {len(stop)}", "stop")
    if not -MAX_PRIORITY <= call.priority <= MAX_PRIORITY:
        raise InvalidRequest(
            f"priority must be from {-MAX_PRIORITY} to {MAX_PRIORITY}, not {call.priority}; lower goes first",
            "priority",
        )
    if len(call.cache_salt) > MAX_CACHE_SALT_CHARS:
        raise InvalidRequest(
            f"cache_salt may have at most {MAX_CACHE_SALT_CHARS} characters, not {len(call.cache_salt)}", "cache_salt"
        )
    for name in ("total_s", "queue_s", "first_token_s"):
        limit = getattr(call.limits, name)
        if limit is not None and not limit > 0:
            field = {"total_s": "timeout_s", "queue_s": "queue_timeout_s", "first_token_s": "first_token_timeout_s"}[
                name
            ]
            raise InvalidRequest(f"{field} must be above 0 seconds, not {limit}", field)


def check_token_ids(token_ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raises InvalidRequest where an id is not in the model's vocabulary."""
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
        raise InvalidRequest(f"{param} holds token {wrong}; this model's tokens are 0 to {vocab_size - 1}", param)
