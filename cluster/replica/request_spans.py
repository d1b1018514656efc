"""The spans of a request at its leader, made when it has ended: from there on nothing of it can wait for them."""

import time
from collections.abc import Mapping
from typing import Final

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer
from opentelemetry.util.types import AttributeValue

from cluster.telemetry import names
from cluster.telemetry.propagation import context_of_header
from engine.request import FinishReason, Output
from engine.timeline import Moment, Timeline

MAX_RANKS_SHOWN: Final = 64
"""Of a larger gang the slowest rank alone."""


def record(tracer: Tracer, replica: str, output: Output, timeline: Timeline) -> None:
    """One span for the request, and one each for its time in the queue, its prefill and its decoding, as far as it
    came. Does nothing where nobody traces it.

    ``output``: its last. ``timeline``: ended.
    """
    if not timeline.trace or timeline.ended is None:
        return
    # Spans are dated by the wall clock; between two of its corrections one offset fits all of a request.
    _Recorder(tracer, time.time() - time.monotonic()).record(replica, output, timeline, timeline.ended)


class _Recorder:
    def __init__(self, tracer: Tracer, offset_s: float) -> None:
        self._tracer = tracer
        self._offset_s = offset_s

    def record(self, replica: str, output: Output, timeline: Timeline, ended: Moment) -> None:
        parent = context_of_header(timeline.trace)
        reason = "" if output.finish_reason is None else output.finish_reason.value
        attributes: dict[str, AttributeValue] = {
            names.REPLICA: replica,
            names.REQUEST_ID: output.request_id,
            names.FINISH_REASON: reason,
            names.CACHED_TOKENS: output.num_cached_tokens,
        }
        whole = self._tracer.start_span(
            f"{names.SEQUENCE} {replica}", parent, SpanKind.SERVER, attributes, start_time=self._ns(timeline.arrived)
        )
        for at_s, event in timeline.events:
            whole.add_event(event, timestamp=self._unix_ns(at_s))
        if output.finish_reason is FinishReason.ERROR:
            whole.set_status(Status(StatusCode.ERROR, output.error))
        inside = trace.set_span_in_context(whole, parent)
        self._phases(inside, timeline, ended)
        whole.end(self._ns(ended))

    def _phases(self, inside: Context, timeline: Timeline, ended: Moment) -> None:
        """Each begins where the one before ended."""
        begun, answered = timeline.begun, timeline.answered
        waited_until = begun or ended
        num_steps = waited_until.num_steps - timeline.arrived.num_steps
        self._phase(names.QUEUE, inside, timeline.arrived, waited_until, {names.NUM_STEPS: num_steps})
        if begun is not None:
            self._phase(names.PREFILL, inside, begun, answered or ended, steps_between(begun, answered or ended))
        if answered is not None:
            self._phase(names.DECODE, inside, answered, ended, steps_between(answered, ended))

    def _phase(
        self, name: str, inside: Context, start: Moment, end: Moment, attributes: Mapping[str, AttributeValue]
    ) -> None:
        span: Span = self._tracer.start_span(name, inside, attributes=attributes, start_time=self._ns(start))
        span.end(self._ns(end))

    def _ns(self, moment: Moment) -> int:
        return self._unix_ns(moment.at_s)

    def _unix_ns(self, at_s: float) -> int:
        return int((at_s + self._offset_s) * 1e9)


def steps_between(start: Moment, end: Moment) -> dict[str, AttributeValue]:
    """How many steps the gang answered meanwhile, how long one took, and how long each rank computed in one (ms, on the
    mean)."""
    num_steps = end.num_steps - start.num_steps
    if num_steps <= 0:
        return {names.NUM_STEPS: 0}
    ranks_ms = [
        (after - before) / num_steps / 1e3 for before, after in zip(start.rank_busy_us, end.rank_busy_us, strict=True)
    ]
    slowest = max(range(len(ranks_ms)), key=ranks_ms.__getitem__)
    shown = ranks_ms if len(ranks_ms) <= MAX_RANKS_SHOWN else [ranks_ms[slowest]]
    return {
        names.NUM_STEPS: num_steps,
        names.STEP_MS: round((end.at_s - start.at_s) / num_steps * 1e3, 3),
        names.RANK_STEP_MS: [round(each, 3) for each in shown],
        names.SLOWEST_RANK: slowest,
    }
