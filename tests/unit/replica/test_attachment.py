"""What waits on a leader for one front end, frame by frame."""

import random

import pytest

from cluster.replica import attachment as module
from cluster.replica.attachment import Attachment
from cluster.rpc import convert
from engine.errors import EngineFailure, InvalidRequest
from engine.request import FinishReason, Output, TopLogprobs

NAMES = {stream: f"r{stream}" for stream in range(1000)}


def drained(attachment: Attachment) -> list[list[tuple[int, Output]]]:
    """What each further frame holds."""
    frames = []
    while attachment.has_waiting:
        frames.append(
            [(stream, output) for stream, output, _ in convert.frame_from_proto(attachment.next_frame(), NAMES)]
        )
    return frames


async def test_one_frame_takes_all_that_waits() -> None:
    attachment = Attachment("f", incarnation=3)
    assert not list(attachment.next_frame().streams)
    for stream in range(500):
        attachment.put(stream, Output(NAMES[stream], [stream]))
    ((*entries,),) = drained(attachment)
    assert entries == [(stream, Output(NAMES[stream], [stream])) for stream in range(500)]


async def test_a_slow_front_end_gets_merged_outputs() -> None:
    attachment = Attachment("f", 1)
    for token in range(50):
        for stream in range(3):
            attachment.put(stream, Output(NAMES[stream], [token]))
    attachment.put(1, Output("r1", [99], FinishReason.LENGTH))
    (frame,) = drained(attachment)
    tokens = list(range(50))
    assert frame == [
        (0, Output("r0", tokens)),
        (1, Output("r1", [*tokens, 99], FinishReason.LENGTH)),
        (2, Output("r2", tokens)),
    ]


async def test_heavy_outputs_are_spread_over_frames() -> None:
    attachment = Attachment("f", 1)
    scores = [TopLogprobs(-1.0, 1, list(range(20)), [-1.0] * 20)] * 5000
    for stream in range(4):
        attachment.put(stream, Output(NAMES[stream], [], prompt_logprobs=list(scores)))
    attachment.put(9, Output("r9", [1]))
    frames = drained(attachment)
    assert len(frames) == 4
    assert sorted(stream for frame in frames for stream, _ in frame) == [0, 1, 2, 3, 9]
    assert all(len(output.prompt_logprobs or [1]) in (1, 5000) for frame in frames for _, output in frame)


async def test_an_error_follows_the_tokens_before_it() -> None:
    attachment = Attachment("f", 1)
    attachment.put(0, Output("r0", [1]))
    attachment.put_error(0, EngineFailure("it broke"))
    attachment.put_error(1, InvalidRequest("bad", "top_k"))
    first = attachment.next_frame()
    assert list(first.streams) == [0, 1] and [finish.stream for finish in first.finishes] == [1]
    second = attachment.next_frame()
    assert list(second.streams) == [0] and second.finishes[0].error_message == "it broke"
    assert not attachment.has_waiting


async def test_what_was_given_up_is_not_sent() -> None:
    attachment = Attachment("f", 1)
    attachment.put(0, Output("r0", [1]))
    attachment.put_error(0, EngineFailure("it broke"))
    attachment.forget(0)
    assert not attachment.has_waiting


async def test_every_frame_stays_below_grpcs_bound() -> None:
    from cluster.rpc.channel import MAX_MESSAGE_BYTES

    attachment = Attachment("f", 1)
    worst = TopLogprobs(-1.0, 2**32 - 1, [2**32 - 1] * 20, [-1.0] * 20)
    for stream in range(50):
        attachment.put(stream, Output(NAMES[stream], [2**32 - 1] * 400, logprobs=[worst] * 400))
    sizes = []
    while attachment.has_waiting:
        sizes.append(attachment.next_frame().ByteSize())
    assert len(sizes) > 1
    assert max(sizes) < MAX_MESSAGE_BYTES / 2, module.MAX_FRAME_WEIGHT


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("bound", [module.MAX_FRAME_WEIGHT, 200])
async def test_single_tokens_go_the_way_of_outputs(seed: int, bound: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever came before them on their stream, and whatever has been sent meanwhile."""
    monkeypatch.setattr(module, "MAX_FRAME_WEIGHT", bound)
    choice = random.Random(seed)
    attachment = Attachment("f", 1)
    expected: dict[int, list[int]] = {}
    found: dict[int, list[int]] = {}
    ended: set[int] = set()
    for token_id in range(300):
        stream = choice.randrange(12)
        kind = choice.choice(["token"] * 6 + ["output", "end", "error", "forget", "frames"])
        if kind == "frames":
            take_frames(attachment, found, ended)
        elif kind == "forget":
            take_frames(attachment, found, ended)
            attachment.put_token(stream, token_id)
            attachment.forget(stream)
        elif stream not in ended:
            expected.setdefault(stream, [])
            if kind == "error":
                attachment.put_error(stream, EngineFailure("lost"))
                ended.add(stream)
                continue
            expected[stream].append(token_id)
            if kind == "token":
                attachment.put_token(stream, token_id)
            else:
                attachment.put(stream, Output("", [token_id], FinishReason.LENGTH if kind == "end" else None))
                ended |= {stream} if kind == "end" else set()
    take_frames(attachment, found, ended)
    assert {stream: found.get(stream, []) for stream in expected} == expected


def take_frames(attachment: Attachment, found: dict[int, list[int]], ended: set[int]) -> None:
    """All that waits: each stream once in a frame, and nothing behind its end."""
    while attachment.has_waiting:
        frame = attachment.next_frame()
        assert len(set(frame.streams)) == len(frame.streams) == len(frame.num_tokens)
        assert {finish.stream for finish in frame.finishes} <= ended & set(frame.streams)
        at = 0
        for stream, count in zip(frame.streams, frame.num_tokens, strict=True):
            found.setdefault(stream, []).extend(frame.token_ids[at : at + count])
            at += count
        assert at == len(frame.token_ids)
