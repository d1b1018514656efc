"""What a client of the simulation asks for, and what it gets."""

import msgspec

from cluster.frontend.calls import Delta, Echo, Event, Finished, ToolCallDelta, Usage
from cluster.frontend.cursor import Cursor
from engine.errors import RemudaError
from engine.request import Request, TopLogprobs

MAX_TRIES = 20


class Record:
    """What one client asked for, and what it got.

    Args:
        name: the request's.
        requests: one per choice.
        stops: strings that end it.
        tool: whose calls are looked for; "" for none.
        poison_at: the position whose computation kills a rank, each time.
    """

    def __init__(
        self,
        name: str,
        requests: list[Request],
        stops: tuple[str, ...] = (),
        tool: str = "",
        poison_at: int | None = None,
    ) -> None:
        self.name = name
        self.requests = requests
        self.stops = stops
        self.tool = tool
        self.poison_at = poison_at
        self.logprobs: list[list[TopLogprobs]] = [[] for _ in requests]
        self.echoes: dict[int, Echo] = {}
        """The prompt with its log-probabilities, by choice."""
        self.usages: list[Usage] = []
        self.token_ids: list[list[int]] = [[] for _ in requests]
        self.text = ["" for _ in requests]
        self.calls: list[list[list[str]]] = [[] for _ in requests]
        """By choice: name and arguments of each call."""
        self.finished: list[Finished] = []
        self.cursor = Cursor(name)
        """Where its reading is."""
        self.num_cuts = 0
        """Times that its front end died."""
        self.num_tries = 0
        self._given_name = name
        self.error: RemudaError | None = None
        self.had_no_replica = False
        """When it got its error, its front end knew of none that was ready."""
        self.has_ended = False

    def cut(self) -> None:
        """Its front end died."""
        self.num_cuts += 1
        if not self.cursor.positions:
            self.name = f"{self._given_name}-{self.num_cuts}"
            self.cursor = Cursor(self.name)
            self.requests = [
                msgspec.structs.replace(request, request_id=f"{self.name}.{index}")
                for index, request in enumerate(self.requests)
            ]

    def take(self, event: Event) -> None:
        """Raises AssertionError where something is missing or came twice."""
        self.cursor.note(event)
        if isinstance(event, Delta):
            tokens = self.token_ids[event.choice]
            assert event.position == len(tokens), (
                f"{self.name}: token {event.position} came where {len(tokens)} was due"
            )
            tokens += event.token_ids
            self.text[event.choice] += event.text
            self.logprobs[event.choice] += event.logprobs or ()
            for call in event.tool_calls:
                add_to(self.calls[event.choice], call)
        elif isinstance(event, Finished):
            assert event.choice not in [end.choice for end in self.finished], f"{self.name} ended twice"
            self.finished.append(event)
        elif isinstance(event, Echo):
            assert event.choice not in self.echoes, f"{self.name}: the prompt came twice"
            self.echoes[event.choice] = event
        elif isinstance(event, Usage):
            self.usages.append(event)


def add_to(calls: list[list[str]], more: ToolCallDelta) -> None:
    """Name and arguments of each."""
    if more.name is not None:
        assert more.index == len(calls), f"call {more.index} came where {len(calls)} was due"
        calls.append([more.name, ""])
    calls[more.index][1] += more.arguments
