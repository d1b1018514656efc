"""What ``remuda bench`` sends: lengths, times and prompts, all from a seed."""

import itertools
import math
import random
import statistics
from pathlib import Path

import pytest

from cluster.bench.arrivals import Arrivals, arrival_times
from cluster.bench.lengths import parse_lengths
from cluster.bench.options import parse_amount, read_token_ids
from cluster.bench.prompts import PromptMaker, TokenIds, Words
from engine.errors import InvalidOption


def draws(text: str, seed: int, count: int = 4000) -> list[int]:
    generator = random.Random(seed)
    lengths = parse_lengths("--prompt-len", text)
    return [lengths.draw(generator) for _ in range(count)]


def test_lengths_are_as_they_are_written(seed: int) -> None:
    assert set(draws("128", seed)) == {128}
    uniform = draws("64-256", seed)
    assert (min(uniform), max(uniform)) == (64, 256)
    assert statistics.mean(uniform) == pytest.approx(160, rel=0.05)


def test_lognormal_lengths_have_the_median_and_spread(seed: int) -> None:
    lengths = draws("lognormal:200,0.5", seed)
    assert statistics.median(lengths) == pytest.approx(200, rel=0.08)
    assert statistics.stdev(map(math.log, lengths)) == pytest.approx(0.5, rel=0.1)
    assert max(draws("lognormal:200,0.5,300", seed)) == 300


def test_the_sharegpt_mix_has_its_published_means() -> None:
    for option, mean in (("--prompt-len", 161.31), ("--output-len", 337.99)):
        lengths, generator = parse_lengths(option, "sharegpt"), random.Random(1)
        assert statistics.mean(lengths.draw(generator) for _ in range(40_000)) == pytest.approx(mean, rel=0.05)


@pytest.mark.parametrize(
    "text", ["0", "9-3", "0-4", "x", "-5", "lognormal:200", "lognormal:200,0", "lognormal:0,1", "1.5"]
)
def test_bad_lengths_are_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidOption, match=f"--output-len {text}: "):
        parse_lengths("--output-len", text)


def first(kind: Arrivals, rate: float, seed: int, count: int) -> list[float]:
    return list(itertools.islice(arrival_times(kind, rate, random.Random(seed)), count))


def test_constant_arrivals_are_evenly_spread(seed: int) -> None:
    assert first(Arrivals.CONSTANT, 4.0, seed, 5) == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_poisson_arrivals_have_exponential_gaps_and_come_from_the_seed(seed: int) -> None:
    times = first(Arrivals.POISSON, 5.0, seed, 20_000)
    assert times[0] == 0.0
    assert times == first(Arrivals.POISSON, 5.0, seed, 20_000)
    assert times != first(Arrivals.POISSON, 5.0, seed + 1, 20_000)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert min(gaps) > 0
    assert statistics.mean(gaps) == pytest.approx(0.2, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(0.2, rel=0.08)
    assert sum(gap > 0.2 for gap in gaps) / len(gaps) == pytest.approx(math.exp(-1), abs=0.02)


def test_prompts_share_beginnings_and_are_the_same_for_a_seed(seed: int) -> None:
    def prompts(number: int) -> list[tuple[int, ...]]:
        maker = PromptMaker(TokenIds(range(1000)), 50, 3, random.Random(number))
        found = [maker.prompt(20) for _ in range(60)]
        return [tuple(prompt) for prompt in found if isinstance(prompt, list)]

    made = prompts(seed)
    assert {len(prompt) for prompt in made} == {70}
    assert len({prompt[:50] for prompt in made}) == 3
    assert len({prompt[50:] for prompt in made}) == 60
    assert made == prompts(seed)
    assert made != prompts(seed + 1)


def test_words_are_as_long_as_the_server_counts_them(seed: int) -> None:
    # A server with 1.5 tokens a word and 20 of a chat template.
    words = Words.calibrated([(32, 68), (160, 260)])
    maker = PromptMaker(words, 0, 1, random.Random(seed))
    prompt = maker.prompt(200)
    assert isinstance(prompt, str)
    assert len(prompt.split()) * 1.5 + 20 == pytest.approx(200, abs=1)


def test_amounts() -> None:
    assert parse_amount(None, "poisson", None, None, None).words == "1 at a time"
    assert parse_amount(2.5, "constant", None, None, 3.0).words == "2.5 requests/s (constant)"


@pytest.mark.parametrize(
    ("amount", "words"),
    [
        ((1.0, "poisson", 4, None, None), "--rate and --concurrency: give one"),
        ((None, "poisson", 4, 3, 1.0), "--num-requests and --duration: give one"),
        ((0.0, "poisson", None, None, None), "--rate 0: give a number above 0"),
        ((math.inf, "poisson", None, None, None), "--rate inf"),
        ((math.nan, "poisson", None, None, None), "--rate nan"),
        ((None, "poisson", None, None, -2.0), "--duration -2"),
        ((1.0, "bursts", None, None, None), "--arrivals bursts: write poisson or constant"),
    ],
)
def test_bad_amounts_are_refused_by_name(
    amount: tuple[float | None, str, int | None, int | None, float | None], words: str
) -> None:
    with pytest.raises(InvalidOption, match=words):
        parse_amount(*amount)


def test_token_ids_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "ids.json"
    file.write_text("[3, 5]")
    assert read_token_ids(file) == (3, 5)
    assert read_token_ids(None) == ()
    for text in ("[]", '["a"]', "{", "[1.5]"):
        file.write_text(text)
        with pytest.raises(InvalidOption, match="--token-ids .*ids.json is"):
            read_token_ids(file)
    with pytest.raises(InvalidOption, match="none.json"):
        read_token_ids(tmp_path / "none.json")
