"""Whole conversations: a system prompt or none, one or several exchanges, names that are told early and asked late."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from recipe_tasks import TASKS, Exchange, unknown
from recipe_words import random_name

Message = dict[str, str]
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are remuda-tiny, a small test model.",
    "Answer in plain English.",
    "You are a friendly assistant. Keep your answers short.",
)
_TELL = (
    "My name is {}.", "Hello, my name is {}.", "Hi, I am {}.", "I am {}.", "You can call me {}.", "I am called {}.",
)  # fmt: skip
_ASK = ("What is my name?", "Do you remember my name?", "Who am I?", "What was my name?", "Say my name.")


@dataclass
class _State:
    name: str | None = None
    messages: list[Message] = field(default_factory=list)


def _sloppy(rng: random.Random, text: str) -> str:
    """What people type: sometimes no capital letter at the front or no mark at the end."""
    draw = rng.random()
    if draw < 0.06 and not text.startswith("I "):
        text = text[0].lower() + text[1:]
    if 0.03 < draw < 0.12 and text[-1] in "?.":
        text = text[:-1]
    return text


def _named_exchange(rng: random.Random, state: _State) -> Exchange | None:
    """Tell a name or ask for the one that was told; None where another task should be taken."""
    if state.name is None:
        if rng.random() > 0.15:
            return None
        state.name = random_name(rng)
        return rng.choice(_TELL).format(state.name), f"Hello, {state.name}! It is nice to meet you."
    if rng.random() > 0.3:
        return None
    return rng.choice(_ASK), f"Your name is {state.name}."


def _next_exchange(rng: random.Random, state: _State) -> Exchange:
    named = _named_exchange(rng, state)
    if named is not None:
        return named
    weights, makers = zip(*TASKS, strict=True)
    while True:
        maker = rng.choices(makers, weights)[0]
        user, assistant = maker(rng)
        # With a name known, "what is my name" has another answer than the stranger's.
        if maker is unknown and "told me your name" in assistant and state.name is not None:
            continue
        if "Your name is" in assistant and state.messages:
            state.name = assistant.removeprefix("Your name is ").removesuffix(".")
        return user, assistant


def conversation(rng: random.Random) -> list[Message]:
    """Messages of one conversation: 1 to 8 exchanges, most often one."""
    state = _State()
    if rng.random() < 0.25:
        state.messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
    num_exchanges = 1 if rng.random() < 0.45 else rng.randint(2, 8)
    first = len(state.messages)
    for _ in range(num_exchanges):
        user, assistant = _next_exchange(rng, state)
        state.messages.append({"role": "user", "content": _sloppy(rng, user)})
        state.messages.append({"role": "assistant", "content": assistant})
    assert len(state.messages) - first == 2 * num_exchanges
    return state.messages
