"""What a step gave the requests of an engine."""

from collections.abc import Iterable, Iterator, Sequence
from typing import overload

from engine.request import Output
from engine.timeline import Timeline, Waits


class Outputs(Sequence[Output]):
    """As a sequence: at most one Output for each request of a step, and what came beside the step.

    Most of it is one token for each request that goes on. ``request_ids`` and ``token_ids`` hold that, and an Output of
    it is made only for who asks for one; ``others`` are all other outputs, and follow behind. Beside the sequence,
    ``begun`` has (request id, how long it had waited) of those that have got their first token, and ``ended`` those
    that have come to their end, each with its last output.
    """

    __slots__ = ("begun", "ended", "others", "request_ids", "token_ids")

    def __init__(self, others: Iterable[Output] = ()) -> None:
        self.request_ids: list[str] = []
        self.token_ids: list[int] = []
        self.others = list(others)
        self.begun: list[tuple[str, Waits]] = []
        self.ended: list[tuple[Output, Timeline]] = []

    def append(self, output: Output) -> None:
        is_token = len(output.token_ids) == 1 and output.finish_reason is None
        if is_token and output.logprobs is None and output.prompt_logprobs is None:
            self.request_ids.append(output.request_id)
            self.token_ids.append(output.token_ids[0])
        else:
            self.others.append(output)

    def end(self, output: Output, timeline: Timeline) -> None:
        """Takes the last output of a request."""
        self.append(output)
        self.ended.append((output, timeline.end()))

    def take(self, more: "Outputs") -> None:
        """Those of other requests, or what ends a request of these."""
        self.request_ids += more.request_ids
        self.token_ids += more.token_ids
        self.others += more.others
        self.begun += more.begun
        self.ended += more.ended

    def __len__(self) -> int:
        return len(self.request_ids) + len(self.others)

    def __iter__(self) -> Iterator[Output]:
        for request_id, token_id in zip(self.request_ids, self.token_ids, strict=True):
            yield Output(request_id, [token_id])
        yield from self.others

    @overload
    def __getitem__(self, index: int) -> Output: ...
    @overload
    def __getitem__(self, index: slice) -> list[Output]: ...
    def __getitem__(self, index: int | slice) -> Output | list[Output]:
        return list(self)[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]
