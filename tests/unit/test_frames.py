"""Frames, the plan ring, and that messages on the wire are plain MessagePack."""

import struct

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ProtocolViolation
from engine.executor.channel import MAX_FRAME_BYTES
from engine.executor.frames import Frame, FrameKind, FrameReader, frame_head
from engine.executor.plan_ring import PlanRing, PlanRingReader
from engine.messages import (
    BatchPlan,
    LoadAdapter,
    NewRequest,
    SampledToken,
    ScheduledRequest,
    StepPlan,
    StepResult,
    UnloadAdapter,
    decode_from_rank,
    encode,
)
from engine.packed import pack
from engine.request import SamplingParams, TopLogprobs


@given(messages=st.lists(st.binary(max_size=50), max_size=8), cuts=st.lists(st.integers(1, 40), max_size=30))
def test_frames_survive_any_split(messages: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(frame_head(FrameKind.MESSAGE, len(m), rank=i, position=i * 7) + m for i, m in enumerate(messages))
    reader, start = FrameReader(), 0
    frames: list[Frame] = []
    for cut in [*cuts, len(stream)]:
        frames += reader.feed(stream[start : start + cut])
        start += cut
    assert [(f.rank, f.position, f.payload) for f in frames] == [(i, i * 7, m) for i, m in enumerate(messages)]


def test_a_ring_frame_has_no_payload() -> None:
    stream = frame_head(FrameKind.IN_RING, 1000, position=5) + frame_head(FrameKind.MESSAGE, 1) + b"x"
    first, second = FrameReader().feed(stream)
    assert (first.kind, first.num_bytes, first.position, first.payload) == (FrameKind.IN_RING, 1000, 5, b"")
    assert second.payload == b"x"


@pytest.mark.parametrize("head", [b"\xff" * 16, b"\x00" * 16, b"\x01\x00\x00\x00" + b"\xff" * 4 + b"\x00" * 8])
def test_malformed_heads_are_refused_before_anything_is_allocated(head: bytes) -> None:
    with pytest.raises(ProtocolViolation, match="malformed"):
        list(FrameReader().feed(head))


def test_too_long_a_message_is_not_sent() -> None:
    with pytest.raises(ProtocolViolation, match="too long"):
        frame_head(FrameKind.MESSAGE, MAX_FRAME_BYTES + 1)


@given(data=st.data())
def test_the_ring_never_overwrites_what_was_not_read(data: st.DataObject) -> None:
    """A model: whatever the writer accepts is what every reader later finds, however far apart the readers are."""
    import os

    ring = PlanRing(256)
    readers = [PlanRingReader(os.dup(ring.fd)) for _ in range(2)]
    pending: list[list[tuple[int, bytes]]] = [[], []]
    try:
        for number in range(data.draw(st.integers(1, 40))):
            action = data.draw(st.sampled_from(["write", "read 0", "read 1"]))
            if action == "write":
                message = bytes([number]) * data.draw(st.integers(1, 300))
                position = ring.write(message, min(reader.consumed for reader in readers))
                if position is not None:
                    for queue in pending:
                        queue.append((position, message))
                elif not any(pending):
                    assert len(message) > 128, "a caught-up ring refused a message of half its size"
            else:
                index = int(action[-1])
                if pending[index]:
                    position, message = pending[index].pop(0)
                    assert readers[index].read(position, len(message)) == message
    finally:
        ring.close()
        for reader in readers:
            reader.close()


def test_an_independent_decoder_reads_our_messages() -> None:
    sampling = SamplingParams(max_tokens=5, seed=-3, logit_bias={7: 1.5}, stop_token_ids=(2,))
    plan = StepPlan(
        3,
        9,
        [
            BatchPlan(
                [4],
                [NewRequest(0, [1, 2], 2, sampling)],
                [ScheduledRequest(0, 0, 2, [], [[1], [2]], True)],
                [(1, 2)],
                pack([5, 3]),
            )
        ],
        [UnloadAdapter(1), LoadAdapter(1, "a", 64)],
    )
    tag, epoch, step, batches, adapters, *_ = msgpack.unpackb(encode(plan), strict_map_key=False)
    assert (tag, epoch, step) == ("plan", 3, 9)
    removed, new, scheduled, copies, decodes = batches[0]
    assert (removed, copies) == ([4], [[1, 2]])
    assert struct.unpack("<2i", decodes) == (5, 3)
    assert new[0][:3] == [0, [1, 2], 2] and new[0][3][:3] == [5, -3, 0] and {7: 1.5} in new[0][3]
    assert scheduled == [[0, 0, 2, [], [[1], [2]], True, -1]]
    assert adapters == [["unload", 1], ["load", 1, "a", 64]]


def test_we_read_what_an_independent_encoder_writes() -> None:
    packed = [struct.pack("<2i", 4, 6), struct.pack("<2i", 128_000, 1)]
    data = msgpack.packb(
        ["result", 3, 9, 1, [[0, 42, [-0.5, 1, [42], [-0.5]]]], [], [[1, "NaN"]], 77, [], [], [], *packed]
    )
    result = decode_from_rank(data)
    assert isinstance(result, StepResult)
    assert result.sampled == [SampledToken(0, 42, TopLogprobs(-0.5, 1, [42], [-0.5]))]
    assert (result.errors[0].message, result.duration_us) == ("NaN", 77)
    assert result.all_sampled == [SampledToken(4, 128_000), SampledToken(6, 1), *result.sampled]


@pytest.mark.parametrize(("slots", "token_ids"), [(b"12345", b"12345"), (b"1234", b"12345678"), (b"", b"1234")])
def test_broken_packed_lists_are_refused(slots: bytes, token_ids: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        _ = StepResult(0, 0, 0, slots=slots, token_ids=token_ids).all_sampled
