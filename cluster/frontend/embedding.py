"""What all APIs' embeddings have in common: an API makes a call of a request, and numbers of the call's events."""

import math
from array import array
from collections.abc import Iterable, Sequence

from cluster.frontend.calls import Call, Event, Finished, Prompt, TimeLimits, TokenPrompt, Usage
from cluster.frontend.model_files import ModelFiles
from cluster.frontend.sampling import check_token_ids
from engine.errors import ContextLengthExceeded, EngineFailure, InvalidRequest

MAX_INPUTS = 2048
"""OpenAI's own bound."""
MAX_VALUES = 8 * 2**20
"""Numbers of one answer; about 20 bytes each where they are written out."""
MAX_AT_ONCE = 32
"""Inputs of one request that the engine has at a time, so that one who sends many leaves room for others."""


def embedding_call(
    request_id: str,
    inputs: Sequence[Prompt],
    dimensions: int | None,
    files: ModelFiles,
    *,
    model: str = "",
    truncates: bool = False,
    limits: TimeLimits = TimeLimits(),
    priority: int = 0,
    cache_salt: str = "",
) -> Call:
    """Raises InvalidRequest: there are too many inputs or dimensions, or an input holds no or unknown tokens."""
    size = int(files.config["hidden_size"])
    if dimensions is not None and not 1 <= dimensions <= size:
        raise InvalidRequest(f"dimensions must be from 1 to {size}, this model's, not {dimensions}", "dimensions")
    most = min(MAX_INPUTS, MAX_VALUES // (dimensions or size))
    if not 1 <= len(inputs) <= most:
        raise InvalidRequest(f"there may be 1 to {most} inputs, not {len(inputs)}; send several requests", "input")
    for prompt in inputs:
        if isinstance(prompt, TokenPrompt):
            if not prompt.token_ids:
                raise InvalidRequest("an input must not be empty", "input")
            check_token_ids(prompt.token_ids, files.vocab_size, "input")
    return Call(
        request_id=request_id,
        prompts=inputs,
        model=model,
        embeds=True,
        truncates=truncates,
        limits=limits,
        priority=priority,
        cache_salt=cache_salt,
    )


def check_length(token_ids: Sequence[int], max_model_len: int) -> None:
    """Of one input, which needs no room for an answer. Raises ContextLengthExceeded."""
    if len(token_ids) > max_model_len:
        raise ContextLengthExceeded(
            f"this model's maximum context length is {max_model_len} tokens, but an input has {len(token_ids)};"
            " shorten it",
            "input",
        )


def embeddings_of(call: Call, events: Iterable[Event], dimensions: int | None) -> tuple[list["array[float]"], Usage]:
    """One for each prompt, of length 1, float32.

    Args:
        call: what was asked.
        events: all of them.
        dimensions: how many numbers of each are kept; None: all.

    Raises:
        EngineFailure: something is missing.
    """
    found: dict[int, array[float]] = {}
    usage: Usage | None = None
    for event in events:
        if isinstance(event, Finished) and event.pooled is not None:
            values = array("f", event.pooled)
            found[event.choice] = values if dimensions is None else _shortened(values, dimensions)
        elif isinstance(event, Usage):
            usage = event
    if usage is None or len(found) != len(call.prompts):
        raise EngineFailure(f"{len(found)} embeddings of {len(call.prompts)} inputs came")
    return [found[index] for index in range(len(found))], usage


def _shortened(values: "array[float]", dimensions: int) -> "array[float]":
    kept = values[:dimensions]
    length = math.hypot(*kept)
    return array("f", [value / length for value in kept]) if length else kept
