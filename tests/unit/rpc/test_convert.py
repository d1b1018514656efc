"""What goes through protobuf and its bytes comes back as it was."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import Draining
from cluster.replica.outputs import merge
from cluster.rpc import convert, replica_info
from cluster.rpc.generated.remuda.v1 import common_pb2, replica_pb2
from cluster.types import RankInfo, ReplicaInfo, ReplicaState
from engine.errors import ContextLengthExceeded, EngineFailure, InvalidRequest, Overloaded, RemudaError, RequestFailure
from engine.request import (
    AdapterInfo,
    FinishReason,
    Grammar,
    GrammarKind,
    Output,
    Pooling,
    Request,
    SamplingParams,
    Tenant,
    TopLogprobs,
)
from engine.timeline import Waits

uint32 = st.integers(0, 2**32 - 1)
real = st.floats(allow_nan=False)
token_lists = st.lists(uint32, max_size=8)

sampling_params = st.builds(
    SamplingParams,
    max_tokens=uint32,
    seed=st.integers(-(2**63), 2**63 - 1),
    choice=uint32,
    min_tokens=uint32,
    temperature=real,
    top_k=uint32,
    top_p=real,
    min_p=real,
    presence_penalty=real,
    frequency_penalty=real,
    repetition_penalty=real,
    logit_bias=st.dictionaries(uint32, real, max_size=4),
    stop_token_ids=st.lists(uint32, max_size=4).map(tuple),
    logprobs=st.none() | uint32,
    prompt_logprobs=st.none() | uint32,
    grammar=st.none() | st.builds(Grammar, kind=st.sampled_from(GrammarKind), text=st.text(max_size=8)),
    pooling=st.none() | st.sampled_from(Pooling),
)
requests = st.builds(
    Request,
    request_id=st.text(max_size=20),
    token_ids=token_lists,
    num_prompt_tokens=uint32,
    sampling=sampling_params,
    priority=st.integers(-(2**31), 2**31 - 1),
    adapter=st.text(max_size=5),
    cache_salt=st.text(max_size=5),
    tenant=st.builds(Tenant, st.text(max_size=5), st.floats(0.01, 100.0), st.integers(-100, 100)),
    trace=st.text(max_size=5),
)
top_logprobs = st.builds(
    TopLogprobs,
    logprob=real,
    rank=st.integers(1, 2**32 - 1),
    token_ids=token_lists,
    logprobs=st.lists(real, max_size=4),
)


@st.composite
def outputs(draw: st.DrawFn) -> Output:
    """Any output that an engine may give. Cached tokens are counted at the end only, errors come with ERROR only."""
    finish = draw(st.none() | st.sampled_from(FinishReason))
    return Output(
        request_id=draw(st.text(max_size=8)),
        token_ids=draw(token_lists),
        finish_reason=finish,
        stop_token_id=draw(st.none() | uint32) if finish is FinishReason.STOP else None,
        logprobs=draw(st.none() | st.lists(top_logprobs, min_size=1, max_size=3)),
        prompt_logprobs=draw(st.none() | st.lists(st.none() | top_logprobs, min_size=1, max_size=3)),
        num_cached_tokens=draw(uint32) if finish is not None else 0,
        error=draw(st.text(min_size=1, max_size=20)) if finish is FinishReason.ERROR else None,
        pooled=draw(st.none() | st.binary(min_size=1, max_size=8)) if finish is FinishReason.STOP else None,
    )


def through_bytes(frame: replica_pb2.LeaderFrame) -> replica_pb2.LeaderFrame:
    return replica_pb2.LeaderFrame.FromString(frame.SerializeToString())


@given(request=requests, stream=uint32)
def test_requests_round_trip(request: Request, stream: int) -> None:
    message = replica_pb2.Submit.FromString(convert.request_to_proto(stream, request).SerializeToString())
    assert message.stream == stream
    assert convert.request_from_proto(message) == request


@given(sampling=sampling_params, defaults=sampling_params)
def test_written_values_win_over_every_default(sampling: SamplingParams, defaults: SamplingParams) -> None:
    message = convert.sampling_to_proto(sampling)
    found = convert.sampling_from_proto(message, defaults, sampling.choice, sampling.pooling)
    for name in SamplingParams.__struct_fields__:
        wanted = getattr(sampling, name)
        # None is written by leaving the field out, as is an empty collection.
        if (wanted is None and name != "pooling") or wanted in ((), {}):
            wanted = getattr(defaults, name)
        assert getattr(found, name) == wanted, name


@given(defaults=sampling_params)
def test_a_field_that_is_not_there_takes_the_default(defaults: SamplingParams) -> None:
    empty = common_pb2.SamplingParams()
    assert convert.sampling_from_proto(empty, defaults, defaults.choice, defaults.pooling) == defaults


def test_zero_is_a_value_and_not_a_default() -> None:
    message = common_pb2.SamplingParams(temperature=0.0, top_k=0, logprobs=0)
    found = convert.sampling_from_proto(message, SamplingParams(max_tokens=7, temperature=1.0, top_k=5, logprobs=3))
    assert (found.temperature, found.top_k, found.logprobs, found.max_tokens) == (0.0, 0, 0, 7)


@given(entries=st.dictionaries(uint32, outputs(), max_size=6), sequence=uint32, incarnation=uint32)
def test_outputs_round_trip(entries: dict[int, Output], sequence: int, incarnation: int) -> None:
    frame = through_bytes(convert.frame_to_proto(incarnation, sequence, entries.items()))
    assert (frame.incarnation, frame.sequence) == (incarnation, sequence)
    names = {stream: output.request_id for stream, output in entries.items()}
    found = convert.frame_from_proto(frame, names)
    assert [(stream, output) for stream, output, _ in found] == list(entries.items())
    for _, output, error in found:
        if output.finish_reason is FinishReason.ERROR:
            assert type(error) is RequestFailure and str(error) == output.error
        else:
            assert error is None


def test_a_stream_that_begins_says_so_before_its_tokens() -> None:
    waits = Waits(0.25, 1.5)
    token = Output("r", [7])
    frame = through_bytes(convert.frame_to_proto(1, 1, [(3, token)], begun={3: waits, 4: Waits(0.0, 0.0)}))
    found = [(stream, output) for stream, output, _ in convert.frame_from_proto(frame, {3: "r"})]
    assert found == [(3, Output("r", [], waits=waits)), (3, token)]
    assert merge([output for _, output in found]) == Output("r", [7], waits=waits)


@given(entries=st.dictionaries(uint32, outputs(), max_size=6), data=st.data())
def test_streams_given_up_are_left_out_and_shift_nothing(entries: dict[int, Output], data: st.DataObject) -> None:
    kept = {stream for stream in entries if data.draw(st.booleans())}
    frame = through_bytes(convert.frame_to_proto(1, 1, entries.items()))
    found = convert.frame_from_proto(frame, {stream: entries[stream].request_id for stream in kept})
    assert {stream: output for stream, output, _ in found} == {stream: entries[stream] for stream in kept}


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("temperature must be at most 100, not 1e9", "temperature"),
        InvalidRequest("no field is to blame"),
        ContextLengthExceeded("too long", "max_tokens"),
        Overloaded("1024 wait", retry_after_s=2.5),
        Draining("going away", retry_after_s=7.0),
        EngineFailure("it broke"),
    ],
)
def test_refusals_come_back_as_what_they_were(error: RemudaError) -> None:
    frame = through_bytes(convert.frame_to_proto(1, 1, [], [(9, error)]))
    ((stream, output, found),) = convert.frame_from_proto(frame, {9: "r"})
    assert (stream, output.finish_reason, output.token_ids) == (9, FinishReason.ERROR, [])
    assert type(found) is type(error) and str(found) == str(error)
    assert vars(found) == vars(error)


@pytest.mark.parametrize("change", [{"num_tokens": [2]}, {"streams": [1, 2]}, {"token_ids": []}])
def test_a_frame_whose_lists_do_not_fit_is_refused(change: dict[str, list[int]]) -> None:
    fields = {"streams": [1], "num_tokens": [1], "token_ids": [5]} | change
    with pytest.raises(ValueError, match="token counts differ"):
        convert.frame_from_proto(replica_pb2.LeaderFrame(**fields), {1: "r"})


@pytest.mark.parametrize(
    "bad", [{"top_k": 2**32}, {"max_tokens": -1}, {"logit_bias": {-1: 0.5}}, {"stop_token_ids": (2**40,)}]
)
def test_numbers_outside_the_wire_type_are_the_callers_error(bad: dict[str, object]) -> None:
    sampling = msgspec.structs.replace(SamplingParams(max_tokens=1), **bad)
    with pytest.raises(InvalidRequest, match="range"):
        convert.request_to_proto(0, Request("r", [1], 1, sampling))


rank_infos = st.builds(
    RankInfo, rank=uint32, pid=uint32, host=st.text(max_size=5), device=st.text(max_size=5), state=st.text(max_size=5)
)
uint64 = st.integers(0, 2**64 - 1)
replica_infos = st.builds(
    ReplicaInfo,
    id=st.text(max_size=5),
    model=st.text(max_size=5),
    state=st.sampled_from(ReplicaState),
    address=st.text(max_size=5),
    incarnation=uint64,
    max_model_len=uint32,
    max_num_seqs=uint32,
    block_size=uint32,
    num_blocks=uint64,
    num_running=uint32,
    num_waiting=uint32,
    kv_cache_usage=real,
    num_steps=uint64,
    ranks=st.lists(rank_infos, max_size=3).map(tuple),
    phase_seconds=st.dictionaries(st.text(max_size=5), real, max_size=3),
    error=st.text(max_size=5),
    progress_age_s=real,
    adapters=st.lists(
        st.builds(AdapterInfo, name=st.text(max_size=5), path=st.text(max_size=5), num_bytes=uint64), max_size=2
    ).map(tuple),
)


@given(info=replica_infos)
def test_replica_infos_round_trip(info: ReplicaInfo) -> None:
    message = replica_info.replica_info_to_proto(info)
    assert replica_info.replica_info_from_proto(replica_pb2.ReplicaInfo.FromString(message.SerializeToString())) == info


def test_the_strategies_above_cover_every_field() -> None:
    """A field added to a message and forgotten here or in convert would go untested."""
    infos = {field.name for field in replica_pb2.ReplicaInfo.DESCRIPTOR.fields}
    assert infos == set(ReplicaInfo.__dataclass_fields__)
    ranks = {field.name for field in replica_pb2.Rank.DESCRIPTOR.fields}
    assert ranks == set(RankInfo.__dataclass_fields__)
    sampling = {field.name for field in common_pb2.SamplingParams.DESCRIPTOR.fields}
    assert sampling == set(SamplingParams.__struct_fields__) - {"choice", "pooling"} | {"ignore_eos"}


@pytest.mark.parametrize("reason", FinishReason)
def test_finish_reasons_round_trip(reason: FinishReason) -> None:
    assert convert.finish_reason_from_proto(convert.finish_reason_to_proto(reason)) is reason


def test_every_wire_value_has_a_meaning() -> None:
    named = {convert.finish_reason_to_proto(reason) for reason in FinishReason} | {common_pb2.FINISH_REASON_UNSPECIFIED}
    assert named == set(common_pb2.FinishReason.values())
    assert convert.finish_reason_from_proto(common_pb2.FINISH_REASON_UNSPECIFIED) is FinishReason.ERROR
