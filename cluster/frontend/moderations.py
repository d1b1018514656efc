"""/v1/moderations, answered by a Llama Guard checkpoint.

A checkpoint is a guard if its chat template makes of a user's message a task: a list of categories, a line each
(``S1: Violent Crimes``), and the question whether the message is ``unsafe``. The categories are what that list says,
for they differ between Guard 2, 3 and 4. The model answers ``safe``, or ``unsafe`` and a line with codes (``S1,S9``).
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.frontend.calls import Call, ChatPrompt, Delta, Event, SamplingOptions
from cluster.frontend.openai_schema import ModerationBody
from cluster.frontend.token_bytes import TokenBytes
from cluster.frontend.tokenizer import Tokenizer
from engine.errors import EngineFailure, InvalidRequest
from engine.request import MAX_LOGPROBS, TopLogprobs

MAX_ANSWER_TOKENS = 64
"""Enough for every code of the longest taxonomy."""

_CATEGORY = re.compile(r"^(S[0-9]{1,2}): *([^\n]*?)[. ]*$", re.MULTILINE)
_CODE = re.compile(r"\bS[0-9]{1,2}\b")


def guard_categories(tokenizer: Tokenizer) -> dict[str, str] | None:
    """Code → name, in the checkpoint's order. None where it is no guard."""
    try:
        task = tokenizer.render_chat([{"role": "user", "content": "x"}])
    except InvalidRequest:
        return None
    categories = {code: name for code, name in _CATEGORY.findall(task) if name}
    return categories if categories and re.search(r"\bunsafe\b", task, re.IGNORECASE) else None


def moderation_call(body: ModerationBody, request_id: str, categories: Mapping[str, str] | None) -> Call:
    """Raises InvalidRequest."""
    if categories is None:
        raise InvalidRequest(
            "this model does not moderate: its chat template asks for no safety verdict; serve a Llama Guard checkpoint"
            " for /v1/moderations",
            "model",
        )
    return Call(
        request_id=request_id,
        prompts=[ChatPrompt([{"role": "user", "content": text}]) for text in body.texts()],
        model=body.model,
        options=SamplingOptions(temperature=0.0, repetition_penalty=1.0, logprobs=MAX_LOGPROBS),
        default_max_tokens=MAX_ANSWER_TOKENS,
    )


@dataclass(frozen=True)
class Verdict:
    """``score``: how probable "unsafe" was, of "safe" and "unsafe"."""

    is_unsafe: bool
    codes: tuple[str, ...]
    score: float


def verdict_of(text: str, tokens: Sequence[str], logprobs: Sequence[TopLogprobs], table: TokenBytes) -> Verdict:
    """What a guard's answer says.

    Args:
        text: all of it.
        tokens: the text of each of its tokens.
        logprobs: of each.
        table: names of tokens.

    Raises:
        EngineFailure: the answer begins with neither word.
    """
    words = text.split(maxsplit=1)
    first = words[0].lower() if words else ""
    if first not in ("safe", "unsafe"):
        raise EngineFailure(f"the model's verdict begins with neither safe nor unsafe, but with {text[:40]!r}")
    is_unsafe = first == "unsafe"
    codes = tuple(dict.fromkeys(_CODE.findall(text))) if is_unsafe else ()
    # The first token that is more than white space decides between the words: they differ in their first letter.
    place = next(index for index, token in enumerate(tokens) if token.strip())
    weights = {"safe": 0.0, "unsafe": 0.0}
    for token, logprob in _candidates(logprobs[place], tokens[place], table):
        for word in weights:
            if token and (word.startswith(token) or token.startswith(word)):
                weights[word] += math.exp(logprob)
    return Verdict(is_unsafe, codes, weights["unsafe"] / (weights["safe"] + weights["unsafe"]))


def _candidates(entry: TopLogprobs, chosen: str, table: TokenBytes) -> list[tuple[str, float]]:
    """Each likely token's text without spaces, and its log-probability; the chosen one once."""
    names = [table.name(token_id) for token_id in entry.token_ids]
    found = list(zip(names, entry.logprobs, strict=True))
    if chosen not in names:
        found.append((chosen, entry.logprob))
    return [(name.strip().lower(), logprob) for name, logprob in found]


class ModerationForm:
    """One request's answer: a result for each input, in order.

    OpenAI's form, keyed by the checkpoint's own codes. A category that the verdict names has the verdict's score, the
    others 0: a guard gives one probability, not one for each. ``category_names`` and ``score`` are additions.
    """

    def __init__(self, call: Call, categories: Mapping[str, str], model: str, table: TokenBytes) -> None:
        self._call = call
        self._categories = categories
        self._model = model
        self._table = table

    def whole(self, events: list[Event]) -> dict[str, Any]:
        """Raises EngineFailure where the model did not give a verdict."""
        results = [self._result(index, events) for index in range(len(self._call.prompts))]
        return {"id": self._call.request_id, "model": self._model, "results": results}

    def _result(self, index: int, events: list[Event]) -> dict[str, Any]:
        deltas = [event for event in events if isinstance(event, Delta) and event.choice == index]
        token_ids = [token_id for delta in deltas for token_id in delta.token_ids]
        logprobs = [entry for delta in deltas for entry in delta.logprobs or ()]
        tokens = [self._table.visible(token_id).decode("utf-8", "replace") for token_id in token_ids]
        verdict = verdict_of("".join(delta.text for delta in deltas), tokens, logprobs, self._table)
        names = {code: self._categories.get(code, code) for code in dict.fromkeys([*self._categories, *verdict.codes])}
        return {
            "flagged": verdict.is_unsafe,
            "categories": {code: code in verdict.codes for code in names},
            "category_scores": {code: verdict.score if code in verdict.codes else 0.0 for code in names},
            "category_applied_input_types": {code: ["text"] for code in names},
            "category_names": names,
            "score": verdict.score,
        }
