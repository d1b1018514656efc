"""Requests for embeddings among others: what they are answered with, and what of it is refused."""

import pytest

from engine.errors import ProtocolViolation
from engine.messages import PooledState, SampledToken, SlotError, StepResult
from engine.request import FinishReason, Output, Pooling
from tests.support.scheduler_bed import Bed


def update(bed: Bed, step: int, **answer: object) -> list[Output]:
    outputs = list(bed.scheduler.update(StepResult(0, step, 0, **answer)))  # type: ignore[arg-type]
    bed.scheduler.check_integrity()
    return outputs


def test_it_ends_with_its_prompt_and_gives_its_blocks_back() -> None:
    bed = Bed(budget=6)
    embedded = bed.add(8, 0, pooling=Pooling.MEAN)
    going_on = bed.add(2)
    assert bed.shares() == [(0, 0, 6)]
    assert update(bed, 0) == [Output(embedded.request_id, [])], "it has begun"
    assert bed.shares() == [(0, 6, 2), (1, 0, 2)]
    batch = bed.schedule()
    assert batch is not None and [share.slot for share in batch.scheduled] == [1], "nothing of it is left to compute"
    pooled = [PooledState(0, b"1234")]
    outputs = update(bed, 1, pooled=pooled, sampled=[SampledToken(1, 7)])
    assert {output.request_id: (output.finish_reason, output.pooled) for output in outputs} == {
        embedded.request_id: (FinishReason.STOP, b"1234"),
        going_on.request_id: (None, None),
    }
    batch = bed.schedule()
    assert batch is not None and batch.removed == [0]


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"sampled": [SampledToken(0, 7), SampledToken(1, 7)]},
        {"pooled": [PooledState(0, b"1234"), PooledState(1, b"1234")]},
        {"pooled": [PooledState(0, b"1234")]},
        {"pooled": [PooledState(1, b"1234")], "sampled": [SampledToken(0, 7)]},
        {"pooled": [PooledState(0, b"1234")] * 2, "sampled": [SampledToken(1, 7)]},
        {"pooled": [PooledState(0, b"1234")], "sampled": [SampledToken(1, 7)], "errors": [SlotError(0, "no")]},
        {"pooled": [PooledState(0, b"1234")], "sampled": [SampledToken(1, 7)], "errors": [SlotError(2, "no")]},
    ],
)
def test_each_slot_gets_what_it_asked_for(answer: dict[str, object]) -> None:
    bed = Bed()
    bed.add(4, 0, pooling=Pooling.LAST)
    bed.add(4)
    assert bed.shares() == [(0, 0, 4), (1, 0, 4)]
    with pytest.raises(ProtocolViolation, match="step 0"):
        update(bed, 0, **answer)


def test_an_error_takes_the_place_of_an_embedding_or_of_a_part_of_it() -> None:
    bed = Bed(budget=4)
    first, second = (bed.add(8, 0, pooling=Pooling.MEAN) for _ in range(2))
    assert bed.shares() == [(0, 0, 4)]
    (failed,) = update(bed, 0, errors=[SlotError(0, "broken")])
    assert (failed.request_id, failed.finish_reason, failed.error) == (first.request_id, FinishReason.ERROR, "broken")
    bed.shares()
    update(bed, 1)
    bed.shares()
    (failed,) = update(bed, 2, errors=[SlotError(second.slot, "broken")])
    assert (failed.request_id, failed.finish_reason) == (second.request_id, FinishReason.ERROR)
    assert bed.scheduler.num_blocks_used == 0
