"""A request's events as messages of vLLM's gRPC protocol: chunks, and each choice once more as a whole."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from cluster.frontend.calls import Call, Delta, Echo, Event, Finished, Started, Usage
from cluster.rpc.generated.vllm import vllm_engine_pb2 as pb
from engine.request import TopLogprobs


@dataclass
class _Choice:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TopLogprobs] = field(default_factory=list)
    echo: Echo | None = None
    finished: Finished | None = None


class VllmForm:
    """One request's answer.

    Args:
        call: what was asked.
        streams: with chunks; else only whole choices.
    """

    def __init__(self, call: Call, streams: bool) -> None:
        self._call = call
        self._streams = streams
        self._num_prompt_tokens = 0
        self._choices: list[_Choice] = []

    def responses(self, event: Event) -> Iterator[pb.GenerateResponse]:
        """What shows this event. Whole choices come with the usage, which knows what came from the cache."""
        if isinstance(event, Started):
            # Not before: until then nobody has looked at what was asked, and n may be any number.
            self._choices = [_Choice() for _ in range(self._call.n)]
            self._num_prompt_tokens = sum(map(len, event.prompt_token_ids))
        elif isinstance(event, Echo):
            self._choices[event.choice].echo = event
        elif isinstance(event, Delta):
            yield from self._delta(event)
        elif isinstance(event, Finished):
            self._choices[event.choice].finished = event
        else:
            for index, choice in enumerate(self._choices):
                assert choice.finished is not None, "usage comes last"
                yield self._complete(index, choice, str(choice.finished.reason), event)

    def aborted(self) -> Iterator[pb.GenerateResponse]:
        """The client had the request stopped: what there was."""
        for index, choice in enumerate(self._choices):
            yield self._complete(index, choice, "abort", Usage(self._num_prompt_tokens, 0, 0))

    def _delta(self, event: Delta) -> Iterator[pb.GenerateResponse]:
        choice = self._choices[event.choice]
        is_first = not choice.token_ids
        choice.token_ids += event.token_ids
        choice.logprobs += event.logprobs or ()
        if not self._streams or not event.token_ids:
            return
        chunk = pb.GenerateStreamChunk(
            token_ids=event.token_ids,
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=len(choice.token_ids),
            index=event.choice,
        )
        if event.logprobs is not None:
            chunk.output_logprobs.CopyFrom(_output_logprobs(event.token_ids, event.logprobs))
        if is_first and choice.echo is not None and choice.echo.logprobs is not None:
            chunk.input_logprobs.CopyFrom(_input_logprobs(choice.echo))
        yield pb.GenerateResponse(chunk=chunk)

    def _complete(self, index: int, choice: _Choice, reason: str, usage: Usage) -> pb.GenerateResponse:
        complete = pb.GenerateComplete(
            output_ids=choice.token_ids,
            finish_reason=reason,
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=len(choice.token_ids),
            cached_tokens=usage.num_cached_tokens,
            index=index,
        )
        if choice.logprobs:
            complete.output_logprobs.CopyFrom(_output_logprobs(choice.token_ids, choice.logprobs))
        if choice.echo is not None and choice.echo.logprobs is not None:
            complete.input_logprobs.CopyFrom(_input_logprobs(choice.echo))
        end = choice.finished
        if end is not None and end.stop_string is not None:
            complete.matched_stop_str = end.stop_string
        elif end is not None and end.stop_token_id in self._call.options.stop_token_ids:
            assert end.stop_token_id is not None, "None is no token id"
            complete.matched_token_id = end.stop_token_id
        return pb.GenerateResponse(complete=complete)


def _output_logprobs(token_ids: Sequence[int], logprobs: Sequence[TopLogprobs]) -> pb.OutputLogProbs:
    return pb.OutputLogProbs(
        token_logprobs=[entry.logprob for entry in logprobs],
        token_ids=token_ids,
        top_logprobs=[pb.TopLogProbs(values=entry.logprobs, token_ids=entry.token_ids) for entry in logprobs],
    )


def _input_logprobs(echo: Echo) -> pb.InputLogProbs:
    entries = echo.logprobs or ()
    return pb.InputLogProbs(
        token_logprobs=[pb.InputTokenLogProb(value=None if entry is None else entry.logprob) for entry in entries],
        token_ids=echo.token_ids,
        top_logprobs=[
            pb.TopLogProbs() if entry is None else pb.TopLogProbs(values=entry.logprobs, token_ids=entry.token_ids)
            for entry in entries
        ],
    )
