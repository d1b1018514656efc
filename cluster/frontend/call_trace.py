"""The span of one call of the model, and those of what the front end does for it."""

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeGuard

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, Status, StatusCode, Tracer
from opentelemetry.util.types import AttributeValue

from cluster.frontend.calls import Call, ChatPrompt, Usage
from cluster.frontend.choice import Choice
from cluster.telemetry import names
from cluster.telemetry.propagation import header_of, span_context_of, trace_id_of
from engine.errors import RemudaError

MAX_TRACED_SEQUENCES = 8
"""Of one call: with n=128 the others would show the same a hundred times."""


class CallTrace:
    """Begins with the call, and ends with ``ended``. Nothing of a prompt or an answer is in it.

    Args:
        tracer: makes the spans.
        call: what is asked for.
        model: what the client says.
        parent: the request that brought it.
        began: ``traceparent`` of the call that its client has come back for; or empty.
    """

    def __init__(self, tracer: Tracer, call: Call, model: str, parent: Context, began: str = "") -> None:
        self._tracer = tracer
        self._operation = operation = _operation_of(call)
        links = [Link(context)] if (context := span_context_of(began)) is not None else []
        self._span = tracer.start_span(operation, parent, links=links)
        self._inside = trace.set_span_in_context(self._span, parent)
        if self._span.is_recording():
            self._describe(call, operation, model)

    def _describe(self, call: Call, operation: str, model: str) -> None:
        options = call.options
        asked: dict[str, AttributeValue | None] = {
            names.OPERATION: operation,
            names.PROVIDER: "remuda",
            names.REQUEST_MODEL: model,
            names.RESPONSE_ID: call.request_id,
            names.REQUEST_MAX_TOKENS: options.max_tokens,
            names.REQUEST_TEMPERATURE: options.temperature,
            names.REQUEST_TOP_P: options.top_p,
            names.REQUEST_SEED: options.seed,
            names.REQUEST_CHOICES: call.n if call.n > 1 else None,
        }
        self._span.set_attributes({name: value for name, value in asked.items() if _can_be_sent(value)})

    def found(self, model: str) -> None:
        """There is such a model, so its name may be in the span's."""
        self._span.update_name(f"{self._operation} {model}")

    @property
    def header(self) -> str:
        """``traceparent`` for what belongs to the call; empty where nobody keeps it."""
        return header_of(self._span)

    @property
    def trace_id(self) -> str:
        return trace_id_of(self._span)

    def headers(self, num_sequences: int) -> Iterator[str]:
        """For each sequence of the call; those that are left out have an empty one."""
        header = self.header
        return (header if index < MAX_TRACED_SEQUENCES else "" for index in range(num_sequences))

    def part(self, name: str) -> AbstractContextManager[Span | None]:
        """The span of something that is done for the call before it runs."""
        return self._part(name) if self._span.is_recording() else nullcontext()

    @contextlib.contextmanager
    def _part(self, name: str) -> Iterator[Span]:
        span = self._tracer.start_span(name, self._inside)
        try:
            yield span
        except RemudaError as error:
            span.set_status(Status(StatusCode.ERROR, type(error).__name__))
            raise
        finally:
            span.end()

    def ended(self, outcome: str, status: int, usage: Usage, choices: Sequence[Choice], arrived_s: float) -> None:
        """However it did. ``status``: HTTP's. ``arrived_s``: when the call came, by the choices' clock."""
        span = self._span
        if span.is_recording():
            reasons = [choice.finished.reason.value for choice in choices if choice.finished is not None]
            span.set_attributes(
                {
                    names.OUTCOME: outcome,
                    names.NUM_SEQUENCES: len(choices),
                    names.FINISH_REASONS: reasons,
                    names.INPUT_TOKENS: usage.num_prompt_tokens,
                    names.OUTPUT_TOKENS: usage.num_completion_tokens,
                    names.CACHED_TOKENS: usage.num_cached_tokens,
                }
            )
            first = [choice.first_token_s for choice in choices if choice.first_token_s is not None]
            if first:
                span.set_attribute(names.FIRST_TOKEN_S, min(first) - arrived_s)
            if status >= 400:
                span.set_attribute(names.ERROR_TYPE, outcome)
            if status >= 500:
                span.set_status(Status(StatusCode.ERROR, outcome))
        span.end()


def _operation_of(call: Call) -> str:
    """In GenAI's words."""
    if call.embeds:
        return "embeddings"
    return "chat" if call.prompts and isinstance(call.prompts[0], ChatPrompt) else "text_completion"


def _can_be_sent(value: AttributeValue | None) -> TypeGuard[AttributeValue]:
    """What a client asks for may be a number that the protocol of traces does not know: it is refused later."""
    return value is not None and not (isinstance(value, int) and not -(2**63) <= value < 2**63)
