"""A service over a scripted backend, with a clock that the test moves."""

from collections.abc import Callable
from typing import Any

from cluster.frontend.calls import (
    Call,
    Delta,
    Echo,
    Event,
    TextPrompt,
)
from cluster.frontend.service import Service
from tests.frontend.scripted import FakeClock, ScriptedBackend

Build = Callable[..., tuple[Service, ScriptedBackend, FakeClock]]


def call(prompt: Any = None, **changes: Any) -> Call:
    prompts = changes.pop("prompts", [prompt or TextPrompt("Hello there")])
    return Call(request_id="q", prompts=prompts, **changes)


async def events_of(service: Service, request: Call) -> list[Event]:
    return [event async for event in service.generate(request)]


def text_of(events: list[Event], choice: int = 0) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta | Echo) and event.choice == choice)
