"""What waits on a leader for one front end, merged stream by stream where the front end is slow.

So a slow front end costs at most the tokens of its live requests, and a fast one gets one frame per step.
"""

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING

from cluster.replica.outputs import merge
from cluster.rpc import convert
from cluster.rpc.generated.remuda.v1 import replica_pb2
from engine.errors import RemudaError
from engine.request import Output

if TYPE_CHECKING:
    from cluster.replica.stream_history import StreamHistory

MAX_FRAME_WEIGHT = 1 << 18
"""Bound of one frame's weight, so that it stays far below channel.MAX_MESSAGE_BYTES: a stream weighs 16, a token or an
alternative in log-probabilities 1 (at most some 25 bytes each)."""


class Attachment:
    """One front end's stream. Belongs to the event loop's thread.

    ``streams``: what is read over it, by the front end's own numbers.
    """

    def __init__(self, front_end_id: str, incarnation: int) -> None:
        self.front_end_id = front_end_id
        self.streams: dict[int, StreamHistory] = {}
        self.wake = asyncio.Event()
        self.is_closing = False
        self._incarnation = incarnation
        self._sequence = 0
        self._outputs: dict[int, Output] = {}
        self._merging: dict[int, list[Output]] = {}
        """Where more than one output waits: all of them, the one in ``_outputs`` first."""
        self._errors: dict[int, RemudaError] = {}
        self._may_be_heavy = False
        """Spares the usual step, one token per stream, the weighing."""

    def put(self, stream: int, output: Output) -> None:
        """The caller sets ``wake`` once for all that a step gave."""
        waiting = self._outputs.get(stream)
        if waiting is not None:
            self._merging.setdefault(stream, [waiting]).append(output)
            self._may_be_heavy = True
            return
        self._outputs[stream] = output
        if output.logprobs or output.prompt_logprobs:
            self._may_be_heavy = True

    def put_error(self, stream: int, error: RemudaError) -> None:
        self._errors[stream] = error

    def forget(self, stream: int) -> None:
        """Nobody waits for this stream any more."""
        self._outputs.pop(stream, None)
        self._merging.pop(stream, None)
        self._errors.pop(stream, None)

    @property
    def has_waiting(self) -> bool:
        return bool(self._outputs or self._errors)

    def close(self) -> None:
        """The stream ends when what waits is sent."""
        self.is_closing = True
        self.wake.set()

    def next_frame(self) -> replica_pb2.LeaderFrame:
        """Takes what waits, up to the bound of a frame. The first frame is empty."""
        outputs, errors = self._take()
        frame = convert.frame_to_proto(self._incarnation, self._sequence, outputs, errors)
        self._sequence += 1
        return frame

    def _take(self) -> tuple[Iterable[tuple[int, Output]], list[tuple[int, RemudaError]]]:
        """An error waits for the frame after its stream's last output: a frame lists a stream once."""
        taken, self._outputs = self._outputs, {}
        if self._may_be_heavy:
            merging, self._merging = self._merging, {}
            taken |= {stream: merge(parts) for stream, parts in merging.items()}
            taken, self._outputs = _split(taken)
            self._may_be_heavy = bool(self._outputs)
        ready: dict[int, RemudaError] = {}
        if self._errors:
            for stream, error in self._errors.items():
                if stream not in taken and stream not in self._outputs:
                    ready[stream] = error
            for stream in ready:
                del self._errors[stream]
        return taken.items(), list(ready.items())


def _split(outputs: dict[int, Output]) -> tuple[dict[int, Output], dict[int, Output]]:
    """What fits into one frame (at least one output), and the rest."""
    weight = 0
    fitting: dict[int, Output] = {}
    rest: dict[int, Output] = {}
    for stream, output in outputs.items():
        weight += _weight(output)
        (fitting if weight <= MAX_FRAME_WEIGHT or not fitting else rest)[stream] = output
    return fitting, rest


def _weight(output: Output) -> int:
    weight = 16 + len(output.token_ids)
    for entries in (output.logprobs, output.prompt_logprobs):
        if entries:
            weight += sum(2 + 2 * len(entry.token_ids) for entry in entries if entry is not None)
    return weight
