"""What waits on a leader for one front end, merged stream by stream where the front end is slow.

So a slow front end costs at most the tokens of its live requests, and a fast one gets one frame per step.
"""

import asyncio
from typing import TYPE_CHECKING

from cluster.replica.outputs import merge
from cluster.rpc import convert
from cluster.rpc.generated.remuda.v1 import replica_pb2
from cluster.rpc.stream_tokens import StreamTokens
from engine.errors import RemudaError
from engine.request import Output
from engine.timeline import Waits

if TYPE_CHECKING:
    from cluster.replica.stream_history import StreamHistory

MAX_FRAME_WEIGHT = 1 << 18
"""Bound of one frame's weight, so that it stays far below channel.MAX_MESSAGE_BYTES: a stream weighs 16, a token or an
alternative in log-probabilities 1 (at most some 25 bytes each)."""

_STREAM_WEIGHT = 16
_BYTES_PER_WEIGHT = 25


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
        self._token_streams: list[int] = []
        self._tokens: list[int] = []
        """Single tokens and their streams, as they came. Of a stream that is in ``_outputs`` too they came first."""
        self._outputs: dict[int, Output] = {}
        self._merging: dict[int, list[Output]] = {}
        """Where more than one output waits: all of them, the one in ``_outputs`` first."""
        self._errors: dict[int, RemudaError] = {}
        self._begun: dict[int, Waits] = {}
        self._may_be_heavy = False
        """Spares the usual step, one token per stream, the weighing."""

    def put_token(self, stream: int, token_id: int) -> None:
        """As ``put`` with an output of one token and nothing else: the usual case, and a cheap one."""
        if stream in self._outputs:
            self.put(stream, Output("", [token_id]))
        else:
            self._token_streams.append(stream)
            self._tokens.append(token_id)

    def put(self, stream: int, output: Output) -> None:
        """The caller sets ``wake`` once for all that a step gave."""
        waiting = self._outputs.get(stream)
        if waiting is not None:
            self._merging.setdefault(stream, [waiting]).append(output)
            self._may_be_heavy = True
            return
        self._outputs[stream] = output
        if output.logprobs or output.prompt_logprobs or output.pooled:
            self._may_be_heavy = True

    def put_begun(self, stream: int, waits: Waits) -> None:
        """Its first token comes about now."""
        self._begun[stream] = waits

    def put_error(self, stream: int, error: RemudaError) -> None:
        self._errors[stream] = error

    def forget(self, stream: int) -> None:
        """Nobody waits for this stream any more."""
        if stream in self._token_streams:
            kept = [entry for entry in zip(self._token_streams, self._tokens, strict=True) if entry[0] != stream]
            self._token_streams, self._tokens = [each for each, _ in kept], [token_id for _, token_id in kept]
        self._outputs.pop(stream, None)
        self._merging.pop(stream, None)
        self._errors.pop(stream, None)
        self._begun.pop(stream, None)

    @property
    def has_waiting(self) -> bool:
        return bool(self._tokens or self._outputs or self._errors or self._begun)

    def close(self) -> None:
        """The stream ends when what waits is sent."""
        self.is_closing = True
        self.wake.set()

    def next_frame(self) -> replica_pb2.LeaderFrame:
        """Takes what waits, up to the bound of a frame. The first frame is empty."""
        tokens = self._take_tokens()
        outputs = self._take_outputs()
        errors = self._take_errors({*tokens.streams, *outputs}) if self._errors else []
        begun, self._begun = self._begun, {}
        frame = convert.frame_to_proto(self._incarnation, self._sequence, outputs.items(), errors, tokens, begun)
        self._sequence += 1
        return frame

    def _take_tokens(self) -> StreamTokens:
        """Each stream once; none where some stream has an output as well, for they are merged into those then."""
        streams, self._token_streams = self._token_streams, []
        token_ids, self._tokens = self._tokens, []
        distinct = set(streams)
        is_light = (_STREAM_WEIGHT + 1) * len(streams) <= MAX_FRAME_WEIGHT // 2
        if is_light and distinct.isdisjoint(self._outputs):
            if len(distinct) == len(streams):
                return StreamTokens(streams, [1] * len(streams), token_ids)
            return StreamTokens.grouped(streams, token_ids)
        outputs, self._outputs, merging, self._merging = self._outputs, {}, self._merging, {}
        for stream, token_id in zip(streams, token_ids, strict=True):
            self.put(stream, Output("", [token_id]))
        for stream, output in outputs.items():
            for part in merging.get(stream, [output]):
                self.put(stream, part)
        self._may_be_heavy = True
        return StreamTokens([], [], [])

    def _take_outputs(self) -> dict[int, Output]:
        taken, self._outputs = self._outputs, {}
        if self._may_be_heavy:
            merging, self._merging = self._merging, {}
            taken |= {stream: merge(parts) for stream, parts in merging.items()}
            taken, self._outputs = _split(taken)
            self._may_be_heavy = bool(self._outputs)
        return taken

    def _take_errors(self, streams: set[int]) -> list[tuple[int, RemudaError]]:
        """An error waits for the frame after its stream's last output: a frame lists a stream once."""
        ready = [
            (stream, error)
            for stream, error in self._errors.items()
            if stream not in streams and stream not in self._outputs
        ]
        for stream, _ in ready:
            del self._errors[stream]
        return ready


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
    weight = _STREAM_WEIGHT + len(output.token_ids) + len(output.pooled or b"") // _BYTES_PER_WEIGHT
    for entries in (output.logprobs, output.prompt_logprobs):
        if entries:
            weight += sum(2 + 2 * len(entry.token_ids) for entry in entries if entry is not None)
    return weight
