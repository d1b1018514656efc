"""A request's events put together, for APIs that answer one choice as a whole."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from cluster.frontend.calls import Delta, Event, Finished, Usage
from engine.errors import EngineFailure
from engine.request import TopLogprobs


def stable_id(*of: object) -> str:
    """24 hexadecimal digits, the same whenever the same thing is shown again: by another front end or after a fault."""
    return hashlib.sha256(" ".join(map(str, of)).encode()).hexdigest()[:24]


def tool_call_id(request_id: str, choice: int, index: int) -> str:
    """Of one tool call. Mistral's templates take ids of nine letters and digits only."""
    return stable_id(request_id, choice, index)[:9]


@dataclass
class WholeCall:
    """One tool call; ``arguments`` is the text of a JSON object, or of its beginning where it broke off."""

    name: str
    arguments: str = ""

    def as_object(self) -> dict[str, object] | None:
        """The arguments; None where they are no whole object."""
        try:
            return msgspec.json.decode(self.arguments, type=dict[str, object])
        except msgspec.DecodeError:
            return None


@dataclass
class WholeAnswer:
    """Choice 0 of a request."""

    text: str
    token_ids: list[int]
    logprobs: list[TopLogprobs]
    tool_calls: list[WholeCall]
    finished: Finished
    usage: Usage


def put_together(events: Iterable[Event]) -> WholeAnswer:
    """All of the events of a request with one choice."""
    texts: list[str] = []
    token_ids: list[int] = []
    logprobs: list[TopLogprobs] = []
    calls: list[WholeCall] = []
    finished: Finished | None = None
    usage: Usage | None = None
    for event in events:
        if isinstance(event, Delta):
            texts.append(event.text)
            token_ids += event.token_ids
            logprobs += event.logprobs or ()
            for call in event.tool_calls:
                if call.name is not None:
                    calls.append(WholeCall(call.name))
                calls[call.index].arguments += call.arguments
        elif isinstance(event, Finished):
            finished = event
        elif isinstance(event, Usage):
            usage = event
    if finished is None or usage is None:
        raise EngineFailure("the request's events ended without an end")
    return WholeAnswer("".join(texts), token_ids, logprobs, calls, finished, usage)
