"""The sampler against transformers' own processors, formulas written out by hand, and statistics."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.executor.draw import kept_weights
from engine.executor.logprobs import MIN_LOGPROB
from engine.executor.penalties import adjust_logits
from engine.executor.sampler import sample
from engine.executor.sampling_row import SamplingRow
from engine.request import SamplingParams

VOCAB = 500
QUANTILE_999 = {7: 24.3, 15: 37.7}
"""99.9 % quantiles of chi-square, by degrees of freedom."""


def make_logits(num_rows: int, vocab: int = VOCAB, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def make_row(history: list[int] | None = None, num_prompt: int | None = None, **options: object) -> SamplingRow:
    history = [1, 2, 3] if history is None else history
    params = SamplingParams(max_tokens=100, **options)  # type: ignore[arg-type]
    return SamplingRow(0, params, history, len(history) if num_prompt is None else num_prompt)


def kept(logits: torch.Tensor, **options: object) -> torch.Tensor:
    params = SamplingParams(max_tokens=1, **options)  # type: ignore[arg-type]
    return kept_weights(logits, [params] * len(logits)) > 0


@pytest.mark.parametrize(
    ("options", "warper"),
    [
        ({"top_k": 1}, TopKLogitsWarper(1)),
        ({"top_k": 40}, TopKLogitsWarper(40)),
        ({"top_k": 499}, TopKLogitsWarper(499)),
        ({"top_p": 0.01}, TopPLogitsWarper(0.01)),
        ({"top_p": 0.5}, TopPLogitsWarper(0.5)),
        ({"top_p": 0.95}, TopPLogitsWarper(0.95)),
        ({"min_p": 0.02}, MinPLogitsWarper(0.02)),
        ({"min_p": 1.0}, MinPLogitsWarper(1.0)),
    ],
)
def test_truncation_keeps_what_transformers_keeps(options: dict[str, float], warper: object) -> None:
    logits = make_logits(16)
    expected = torch.isfinite(warper(None, logits.clone()))  # type: ignore[operator]
    assert torch.equal(kept(logits, **options), expected)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_temperature_top_k_and_top_p_together(temperature: float) -> None:
    logits = make_logits(16, seed=1)
    expected = logits.clone()
    for warper in (TemperatureLogitsWarper(temperature), TopKLogitsWarper(30), TopPLogitsWarper(0.8)):
        expected = warper(None, expected)
    assert torch.equal(kept(logits, temperature=temperature, top_k=30, top_p=0.8), torch.isfinite(expected))


def test_nucleus_of_a_large_vocabulary_is_exact_past_the_first_candidates() -> None:
    """A nearly flat row needs more than the 1024 candidates that are tried first, a steep one does not."""
    logits = make_logits(2, vocab=8000, seed=2)
    logits[0] *= 0.01
    expected = torch.isfinite(TopPLogitsWarper(0.9)(None, logits.clone()))
    assert expected[0].sum() > 1024 > expected[1].sum()
    assert torch.equal(kept(logits, top_p=0.9), expected)


def test_ties_at_the_border_are_all_kept() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 0.0]])
    assert kept(logits, top_k=2).tolist() == [[True, True, True, False]]
    assert kept(logits, top_p=0.6).tolist() == [[True, True, True, False]]


def test_repetition_penalty_is_that_of_transformers() -> None:
    histories = [[3, 3, 7, 100], [499, 0, 0, 0]]
    logits = make_logits(2, seed=3)
    expected = torch.cat(
        [
            RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([history]), logits[i : i + 1].clone())
            for i, history in enumerate(histories)
        ]
    )
    adjust_logits(logits, [make_row(history, 2, repetition_penalty=1.3) for history in histories])
    assert torch.equal(logits, expected)


def test_presence_and_frequency_count_output_only() -> None:
    logits = make_logits(1, seed=4)
    expected = logits.clone()
    # The prompt is [5, 6]; the output is [6, 7, 7].
    expected[0, 6] -= 0.25 * 1 + 0.5
    expected[0, 7] -= 0.25 * 2 + 0.5
    adjust_logits(logits, [make_row([5, 6, 6, 7, 7], 2, frequency_penalty=0.25, presence_penalty=0.5)])
    assert torch.allclose(logits, expected, rtol=0, atol=1e-6)
    assert (logits != expected).sum() == 0


def test_bias_comes_after_penalties() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0]])
    adjust_logits(logits, [make_row([0, 1], 1, repetition_penalty=2.0, logit_bias={0: 10.0, 2: -1.0})])
    assert logits.tolist() == [[11.0, -4.0, 0.0]]


def test_min_tokens_bans_stop_tokens_until_reached() -> None:
    stop = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": (4, VOCAB + 7)}
    logits = make_logits(2, seed=5)
    logits[:, 4] = 50.0
    early, late = make_row([1, 2, 3], 2, **stop), make_row([1, 2, 3], 1, **stop)
    second = int(logits[0].topk(2).indices[1])
    assert sample(logits, [early, late]).token_ids == [second, 4]


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [77, 300, 301]] = 4.0
    assert sample(logits, [make_row(temperature=0.0)]).token_ids == [77]


@pytest.mark.parametrize("temperature", [5e-324, 1e-46, 1e-20, 9e-6])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = torch.linspace(-2, 3, VOCAB).repeat(2, 1)
    logits[0, 200] = 60.0
    assert sample(logits, [make_row(temperature=temperature), make_row(temperature=1e-5)]).token_ids == [200, VOCAB - 1]


def chi_square(options: dict[str, object], probabilities: np.ndarray, logits: torch.Tensor) -> float:
    """Draws at many positions of one request against expected probabilities."""
    count = 20_000
    rows = [make_row(list(range(position)), 0, seed=99, **options) for position in range(1, 201)]
    observed = np.zeros(logits.shape[1])
    for choice in range(count // len(rows)):
        batch = [
            SamplingRow(0, SamplingParams(max_tokens=1, seed=99, choice=choice, **options), row.token_ids, 0)  # type: ignore[arg-type]
            for row in rows
        ]
        tokens = sample(logits.expand(len(rows), -1).clone(), batch).token_ids
        observed += np.bincount(tokens, minlength=logits.shape[1])
    assert observed[probabilities == 0].sum() == 0
    expected = probabilities[probabilities > 0] * count
    return float(((observed[probabilities > 0] - expected) ** 2 / expected).sum())


def test_draws_follow_the_distribution() -> None:
    logits = make_logits(1, vocab=16, seed=6, scale=1.0)
    scores = logits[0].double().numpy() / 1.5
    probabilities = np.exp(scores) / np.exp(scores).sum()
    assert chi_square({"temperature": 1.5}, probabilities, logits) < QUANTILE_999[15]


def test_draws_follow_the_truncated_distribution() -> None:
    logits = make_logits(1, vocab=16, seed=7, scale=1.0)
    scores = logits[0].double().numpy()
    scores[np.argsort(scores)[:-8]] = -np.inf
    probabilities = np.exp(scores) / np.exp(scores).sum()
    assert chi_square({"top_k": 8}, probabilities, logits) < QUANTILE_999[7]


MIXED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0.7, "top_k": 5, "seed": 2, "logprobs": 3},
    {"temperature": 1.3, "top_p": 0.9, "seed": 3, "repetition_penalty": 1.2},
    {"temperature": 1.0, "min_p": 0.05, "seed": 4, "frequency_penalty": 0.4, "presence_penalty": 0.1},
    {"temperature": 0.0, "logprobs": 20, "logit_bias": {3: 2.0}},
    {"temperature": 5.0, "seed": -9, "choice": 3, "logprobs": 0, "top_k": 400, "top_p": 0.99, "min_p": 1e-4},
]


def test_a_row_does_not_depend_on_its_batch_nor_its_place() -> None:
    logits = make_logits(35, seed=8).to(torch.bfloat16).float()
    generator = np.random.default_rng(8)
    rows = [
        make_row(generator.integers(0, VOCAB, 5 + r).tolist(), 3, **MIXED[r % len(MIXED)]) for r in range(len(logits))
    ]
    together = sample(logits.clone(), rows)
    for r, row in enumerate(rows):
        alone = sample(logits[r : r + 1].clone(), [row])
        assert alone.token_ids == [together.token_ids[r]]
        assert alone.logprobs == [together.logprobs[r]]
    order = generator.permutation(len(rows)).tolist()
    shuffled = sample(logits[order].clone(), [rows[r] for r in order])
    assert shuffled.token_ids == [together.token_ids[r] for r in order]
    assert shuffled.logprobs == [together.logprobs[r] for r in order]


def test_resuming_elsewhere_gives_the_same_token() -> None:
    """What was output before a failover may be prompt after it: without penalties only the position counts."""
    logits = make_logits(1, seed=9)
    tokens = {
        sample(logits.clone(), [make_row([4, 5, 6, 7], num_prompt, seed=11)]).token_ids[0] for num_prompt in (1, 2, 4)
    }
    assert len(tokens) == 1


def test_choices_of_one_seed_differ() -> None:
    logits = torch.zeros(64, VOCAB)
    rows = [make_row(seed=5, choice=choice) for choice in range(64)]
    assert len(set(sample(logits, rows).token_ids)) > 40


def test_logprobs_are_natural_and_ordered() -> None:
    logits = make_logits(1, seed=10)
    expected = torch.log_softmax(logits.double(), dim=-1)[0]
    output = sample(logits.clone(), [make_row(temperature=0.5, seed=3, logprobs=5)])
    found = output.logprobs[0]
    assert found is not None
    token = output.token_ids[0]
    assert found.logprob == pytest.approx(float(expected[token]), abs=1e-5)
    assert found.rank == 1 + int((expected > expected[token]).sum())
    best = expected.topk(5)
    assert found.token_ids == best.indices.tolist()
    assert found.logprobs == pytest.approx(best.values.tolist(), abs=1e-5)


def test_tied_logprobs_are_listed_by_id() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[0, [400, 20]] = 1.0
    outputs = sample(logits, [make_row(temperature=0.0, logprobs=4), make_row(temperature=0.0, logprobs=2)])
    assert [entry.token_ids for entry in outputs.logprobs if entry] == [[20, 400, 0, 1], [0, 1]]


def test_banned_tokens_have_a_finite_logprob() -> None:
    logits = torch.tensor([[1.0, 5.0, 2.0]])
    row = make_row(temperature=0.0, min_tokens=1, stop_token_ids=(1,), logprobs=3)
    found = sample(logits, [row]).logprobs[0]
    assert found is not None and found.token_ids == [2, 0, 1]
    assert found.logprobs[-1] == MIN_LOGPROB and math.isclose(
        sum(math.exp(v) for v in found.logprobs), 1.0, abs_tol=1e-6
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_unusable_logits_spoil_their_row_only(bad: float, temperature: float) -> None:
    logits = make_logits(3, seed=12)
    rows = [make_row(temperature=temperature, seed=r, logprobs=1, top_p=0.9) for r in range(3)]
    good = sample(logits.clone(), rows)
    if bad == float("-inf"):
        logits[1] = bad
    else:
        logits[1, 5] = bad
    output = sample(logits, rows)
    assert output.valid == [True, False, True]
    assert [output.token_ids[0], output.token_ids[2]] == [good.token_ids[0], good.token_ids[2]]
    assert output.token_ids[1] == 0 and output.logprobs[1] is None
