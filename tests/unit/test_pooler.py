"""What a rank makes of hidden states, by itself."""

import numpy as np
import pytest
import torch

from engine.executor.pooler import Pooler
from engine.request import Pooling, SamplingParams
from engine.slot_table import ScheduledSlot, SlotState

WIDTH = 8


def slot(
    number: int, pooling: Pooling | None, start: int, num_tokens: int, num_prompt_tokens: int = 6
) -> ScheduledSlot:
    sampling = SamplingParams(0 if pooling else 1, pooling=pooling)
    state = SlotState(list(range(num_prompt_tokens)), num_prompt_tokens, sampling, [], [])
    return ScheduledSlot(number, state, start, num_tokens, False)


def unit(vector: torch.Tensor) -> list[float]:
    return (vector.double() / vector.double().norm()).tolist()


def test_chunks_of_several_prompts_beside_others() -> None:
    rows = torch.randn(15, WIDTH, generator=torch.Generator().manual_seed(0))
    pooler = Pooler()
    first = [slot(3, Pooling.MEAN, 0, 4), slot(1, None, 0, 2), slot(2, Pooling.LAST, 0, 5)]
    assert pooler.take(rows[:11], first) == ([], [])
    pooled, errors = pooler.take(
        rows[11:], [slot(1, None, 2, 1), slot(2, Pooling.LAST, 5, 1), slot(3, Pooling.MEAN, 4, 2)]
    )
    assert not errors and [each.slot for each in pooled] == [2, 3]
    last, mean = (np.frombuffer(each.values, "<f4") for each in pooled)
    assert last == pytest.approx(unit(rows[12]), abs=1e-6)
    assert mean == pytest.approx(unit(torch.cat([rows[:4], rows[13:15]]).mean(0)), abs=1e-6)


def test_a_slot_that_was_given_away_begins_anew() -> None:
    rows = torch.randn(10, WIDTH, generator=torch.Generator().manual_seed(1))
    pooler = Pooler()
    pooler.take(rows[:4], [slot(0, Pooling.MEAN, 0, 4)])
    pooler.forget([0, 5])
    (found,), _ = pooler.take(rows[4:], [slot(0, Pooling.MEAN, 0, 6)])
    assert np.frombuffer(found.values, "<f4") == pytest.approx(unit(rows[4:].mean(0)), abs=1e-6)


def test_a_long_mean_of_bfloat16_is_no_less_exact_in_chunks() -> None:
    rows = (torch.randn(4096, WIDTH, generator=torch.Generator().manual_seed(2)) + 3).bfloat16()
    pooler = Pooler()
    for start in range(0, 4096, 512):
        pooled, _ = pooler.take(rows[start : start + 512], [slot(0, Pooling.MEAN, start, 512, 4096)])
    expected = unit(rows.double().mean(0))
    assert np.frombuffer(pooled[0].values, "<f4") == pytest.approx(expected, abs=1e-7)


def test_what_is_not_a_number_is_an_error_of_its_own_request() -> None:
    rows = torch.ones(12, WIDTH)
    rows[2, 3] = torch.nan
    pooled, errors = Pooler().take(rows, [slot(0, Pooling.MEAN, 0, 6), slot(1, Pooling.MEAN, 0, 6)])
    assert [each.slot for each in pooled] == [1] and [each.slot for each in errors] == [0]
    assert "NaN" in errors[0].message
