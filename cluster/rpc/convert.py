"""Between requests with their outputs and protobuf's messages (cluster.rpc.replica_info has the rest).

Field by field, nothing clever: a field missing here fails the round-trip tests.
"""

from collections.abc import Iterable, Mapping, Sequence

from cluster.rpc.generated.remuda.v1 import common_pb2, replica_pb2
from cluster.rpc.status import ErrorFields, error_of, fields_of
from cluster.rpc.stream_tokens import StreamTokens
from cluster.rpc.tenant import tenant_from_proto, tenant_to_proto
from engine.errors import InvalidRequest, RemudaError, RequestFailure
from engine.request import (
    FinishReason,
    Grammar,
    GrammarKind,
    Output,
    Pooling,
    Request,
    SamplingParams,
    TopLogprobs,
)
from engine.timeline import Waits

_FINISH_TO_PROTO: dict[FinishReason, common_pb2.FinishReason.ValueType] = {
    FinishReason.STOP: common_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: common_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORT: common_pb2.FINISH_REASON_ABORT,
    FinishReason.ERROR: common_pb2.FINISH_REASON_ERROR,
}
_FINISH_FROM_PROTO = {value: reason for reason, value in _FINISH_TO_PROTO.items()}

_POOLING_TO_PROTO: dict[Pooling | None, replica_pb2.Pooling.ValueType] = {
    None: replica_pb2.POOLING_UNSPECIFIED,
    Pooling.LAST: replica_pb2.POOLING_LAST,
    Pooling.MEAN: replica_pb2.POOLING_MEAN,
}
_POOLING_FROM_PROTO = {value: pooling for pooling, value in _POOLING_TO_PROTO.items()}

SAMPLING_SCALARS = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "logprobs",
    "prompt_logprobs",
)
"""SamplingParams' fields that are ``optional`` scalars of the same name in the message."""


def finish_reason_to_proto(reason: FinishReason) -> common_pb2.FinishReason.ValueType:
    return _FINISH_TO_PROTO[reason]


def finish_reason_from_proto(reason: common_pb2.FinishReason.ValueType) -> FinishReason:
    """A reason that this version does not know is an error of the other side."""
    return _FINISH_FROM_PROTO.get(reason, FinishReason.ERROR)


def sampling_to_proto(sampling: SamplingParams) -> common_pb2.SamplingParams:
    """Every value is written out, so that the two sides' defaults may differ. ``choice`` and ``pooling`` travel beside.

    Raises:
        InvalidRequest: a number that does not fit its wire type, for example top_k above 2³² − 1.
    """
    scalars = {name: getattr(sampling, name) for name in SAMPLING_SCALARS}
    try:
        return common_pb2.SamplingParams(
            logit_bias=sampling.logit_bias,
            stop_token_ids=sampling.stop_token_ids,
            grammar=_grammar_to_proto(sampling.grammar) if sampling.grammar else None,
            **scalars,
        )
    except ValueError as error:
        raise InvalidRequest(f"a sampling parameter is outside the range of its wire type: {error}") from error


def sampling_from_proto(
    message: common_pb2.SamplingParams, defaults: SamplingParams, choice: int = 0, pooling: Pooling | None = None
) -> SamplingParams:
    """A field that is not there keeps its value in ``defaults``, as do stop_token_ids and logit_bias where empty."""
    present = {field.name for field, _ in message.ListFields()}
    values = {name: getattr(message if name in present else defaults, name) for name in SAMPLING_SCALARS}
    return SamplingParams(
        choice=choice,
        logit_bias=dict(message.logit_bias) or defaults.logit_bias,
        stop_token_ids=tuple(message.stop_token_ids) or defaults.stop_token_ids,
        grammar=grammar_from_proto(message) or defaults.grammar,
        pooling=pooling,
        **values,
    )


def _grammar_to_proto(grammar: Grammar) -> common_pb2.Grammar:
    message = common_pb2.Grammar()
    setattr(message, grammar.kind.value, grammar.text)
    return message


def grammar_from_proto(message: common_pb2.SamplingParams) -> Grammar | None:
    """None where there is none, or of a kind that this version does not know."""
    kind = message.grammar.WhichOneof("form")
    return None if kind is None else Grammar(GrammarKind(kind), getattr(message.grammar, kind))


def request_to_proto(stream: int, request: Request) -> replica_pb2.Submit:
    """Raises InvalidRequest where a number does not fit its wire type."""
    try:
        return replica_pb2.Submit(
            stream=stream,
            request_id=request.request_id,
            token_ids=request.token_ids,
            num_prompt_tokens=request.num_prompt_tokens,
            sampling=sampling_to_proto(request.sampling),
            choice=request.sampling.choice,
            priority=request.priority,
            adapter=request.adapter,
            cache_salt=request.cache_salt,
            tenant=tenant_to_proto(request.tenant),
            trace=request.trace,
            pooling=_POOLING_TO_PROTO[request.sampling.pooling],
        )
    except InvalidRequest:
        raise
    except ValueError as error:
        raise InvalidRequest(f"a field of the request is outside the range of its wire type: {error}") from error


_NO_DEFAULTS = SamplingParams(max_tokens=0)


def request_from_proto(message: replica_pb2.Submit) -> Request:
    """A front end writes every field; max_tokens left out becomes 0, which the engine refuses, and so it does a way of
    pooling that this version does not know."""
    pooling = _POOLING_FROM_PROTO.get(message.pooling)
    return Request(
        request_id=message.request_id,
        token_ids=list(message.token_ids),
        num_prompt_tokens=message.num_prompt_tokens,
        sampling=sampling_from_proto(message.sampling, _NO_DEFAULTS, message.choice, pooling),
        priority=message.priority,
        adapter=message.adapter,
        cache_salt=message.cache_salt,
        tenant=tenant_from_proto(message),
        trace=message.trace,
    )


def logprobs_to_proto(entry: TopLogprobs | None) -> common_pb2.TokenLogprobs:
    """None (the first prompt token has no prediction) is the empty message; ranks count from 1, so rank 0 marks it."""
    if entry is None:
        return common_pb2.TokenLogprobs()
    return common_pb2.TokenLogprobs(
        logprob=entry.logprob, rank=entry.rank, token_ids=entry.token_ids, logprobs=entry.logprobs
    )


def logprobs_from_proto(message: common_pb2.TokenLogprobs) -> TopLogprobs | None:
    if message.rank == 0:
        return None
    return TopLogprobs(message.logprob, message.rank, list(message.token_ids), list(message.logprobs))


def frame_to_proto(
    incarnation: int,
    sequence: int,
    outputs: Iterable[tuple[int, Output]],
    refusals: Sequence[tuple[int, RemudaError]] = (),
    tokens: StreamTokens = StreamTokens([], [], []),
    begun: Mapping[int, Waits] = {},
) -> replica_pb2.LeaderFrame:
    """Packs what one step gave the streams of one front end.

    ``outputs`` are (stream, output), each stream at most once over all arguments; ``refusals`` are requests that
    ended with an error; ``tokens`` are those of streams that got nothing else; ``begun`` says how long streams waited,
    listed or not. An output's ``num_cached_tokens`` travels with its finish only.
    """
    entries = list(outputs)
    streams = tokens.streams + [stream for stream, _ in entries]
    num_tokens = tokens.num_tokens + [len(output.token_ids) for _, output in entries]
    token_ids = tokens.token_ids + [token_id for _, output in entries for token_id in output.token_ids]
    logprobs = [_stream_logprobs(s, output) for s, output in entries if output.logprobs or output.prompt_logprobs]
    finishes = [_stream_finish(stream, output) for stream, output in entries if output.finish_reason is not None]
    for stream, error in refusals:
        streams.append(stream)
        num_tokens.append(0)
        finishes.append(_error_finish(stream, fields_of(error)))
    return replica_pb2.LeaderFrame(
        incarnation=incarnation,
        sequence=sequence,
        streams=streams,
        num_tokens=num_tokens,
        token_ids=token_ids,
        logprobs=logprobs,
        finishes=finishes,
        begun=[
            replica_pb2.StreamBegun(stream=stream, queue_s=waits.queue_s, prefill_s=waits.prefill_s)
            for stream, waits in begun.items()
        ],
    )


def _stream_logprobs(stream: int, output: Output) -> replica_pb2.StreamLogprobs:
    return replica_pb2.StreamLogprobs(
        stream=stream,
        tokens=map(logprobs_to_proto, output.logprobs or ()),
        prompt=map(logprobs_to_proto, output.prompt_logprobs or ()),
    )


def _stream_finish(stream: int, output: Output) -> replica_pb2.StreamFinish:
    assert output.finish_reason is not None
    if output.finish_reason is FinishReason.ERROR:
        fields = ErrorFields(RequestFailure.__name__, output.error or "the engine gave no reason")
        return _error_finish(stream, fields, output.num_cached_tokens)
    return replica_pb2.StreamFinish(
        stream=stream,
        reason=_FINISH_TO_PROTO[output.finish_reason],
        stop_token_id=output.stop_token_id,
        num_cached_tokens=output.num_cached_tokens,
        pooled=output.pooled or b"",
    )


def _error_finish(stream: int, fields: ErrorFields, num_cached_tokens: int = 0) -> replica_pb2.StreamFinish:
    return replica_pb2.StreamFinish(
        stream=stream,
        reason=common_pb2.FINISH_REASON_ERROR,
        num_cached_tokens=num_cached_tokens,
        error_kind=fields.kind,
        error_message=fields.message,
        error_param=fields.param,
        retry_after_s=fields.retry_after_s,
    )


def frame_from_proto(
    frame: replica_pb2.LeaderFrame, request_ids: Mapping[int, str]
) -> list[tuple[int, Output, RemudaError | None]]:
    """Unpacks (stream, output, error). Streams that ``request_ids`` does not name were given up already: left out.

    An error's output still holds the tokens that came before it, with finish reason ERROR. A stream that has begun has
    one more output, before the other.

    Raises:
        ValueError: the frame's lists do not fit one another.
    """
    token_ids = list(frame.token_ids)
    num_tokens = list(frame.num_tokens)
    if len(num_tokens) != len(frame.streams) or sum(num_tokens) != len(token_ids):
        raise ValueError(f"frame {frame.sequence} lists {len(frame.streams)} streams, but its token counts differ")
    logprobs = {entry.stream: entry for entry in frame.logprobs} if frame.logprobs else {}
    finishes = {entry.stream: entry for entry in frame.finishes} if frame.finishes else {}
    unpacked: list[tuple[int, Output, RemudaError | None]] = []
    for entry in frame.begun:
        if (request_id := request_ids.get(entry.stream)) is not None:
            unpacked.append((entry.stream, Output(request_id, [], waits=Waits(entry.queue_s, entry.prefill_s)), None))
    end = 0
    for stream, count in zip(frame.streams, num_tokens, strict=True):
        start, end = end, end + count
        request_id = request_ids.get(stream)
        if request_id is None:
            continue
        tokens = token_ids[start:end]
        if stream in finishes or stream in logprobs:
            unpacked.append((stream, *_full_output(request_id, tokens, logprobs.get(stream), finishes.get(stream))))
        else:
            unpacked.append((stream, Output(request_id, tokens), None))
    return unpacked


def _full_output(
    request_id: str,
    token_ids: list[int],
    logprobs: replica_pb2.StreamLogprobs | None,
    finish: replica_pb2.StreamFinish | None,
) -> tuple[Output, RemudaError | None]:
    """An output with more than tokens, and the error that ended it."""
    entries: list[TopLogprobs] | None = None
    prompt: list[TopLogprobs | None] | None = None
    if logprobs is not None:
        if logprobs.tokens:
            entries = [entry for entry in map(logprobs_from_proto, logprobs.tokens) if entry is not None]
        if logprobs.prompt:
            prompt = [logprobs_from_proto(entry) for entry in logprobs.prompt]
    if finish is None:
        return Output(request_id, token_ids, logprobs=entries, prompt_logprobs=prompt), None
    output = Output(
        request_id,
        token_ids,
        finish_reason=finish_reason_from_proto(finish.reason),
        stop_token_id=finish.stop_token_id if finish.HasField("stop_token_id") else None,
        logprobs=entries,
        prompt_logprobs=prompt,
        num_cached_tokens=finish.num_cached_tokens,
        error=finish.error_message or None,
        pooled=finish.pooled or None,
    )
    return output, _finish_error(finish)


def _finish_error(finish: replica_pb2.StreamFinish) -> RemudaError | None:
    if finish.reason != common_pb2.FINISH_REASON_ERROR:
        return None
    return error_of(
        ErrorFields(
            kind=finish.error_kind,
            message=finish.error_message,
            param=finish.error_param if finish.HasField("error_param") else None,
            retry_after_s=finish.retry_after_s if finish.HasField("retry_after_s") else None,
        )
    )
