"""What a request may ask of the sampler: ranges, counts, and the field that an error names."""

import pytest

from engine.errors import InvalidRequest
from engine.request import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOP_TOKEN_IDS, SamplingParams

VOCAB = 5000


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("min_tokens", 9),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_k", 2**64),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0.0),
        ("seed", 2**63),
        ("logprobs", MAX_LOGPROBS + 1),
        ("prompt_logprobs", -1),
        ("logit_bias", {VOCAB: 1.0}),
        ("logit_bias", {1: 101.0}),
        ("logit_bias", dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 1.0)),
        ("stop_token_ids", (2,) * (MAX_STOP_TOKEN_IDS + 1)),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(field: str, value: object) -> None:
    params = SamplingParams(**{"max_tokens": 8, field: value})  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest) as caught:
        params.validate(VOCAB)
    assert caught.value.param == field
    assert field in str(caught.value)


def test_the_borders_are_allowed() -> None:
    SamplingParams(
        max_tokens=8,
        min_tokens=8,
        temperature=0.0,
        top_p=1.0,
        seed=-(2**63),
        logprobs=MAX_LOGPROBS,
        logit_bias=dict.fromkeys(range(MAX_LOGIT_BIAS), -100.0),
        stop_token_ids=tuple(range(MAX_STOP_TOKEN_IDS)),
    ).validate(VOCAB)
