"""The random numbers: Random123's published known answers, and that a number depends on nothing but its arguments."""

import numpy as np
import pytest

from engine.executor.philox import philox4x32, uniforms

# Random123, tests/kat_vectors, the lines "philox4x32 10": counter (4 words), key (2 words), answer (4 words).
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> np.ndarray:
    return np.array([[int(word, 16)] for word in text.split()], dtype=np.uint64)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, answer: str) -> None:
    assert philox4x32(words(counter), words(key)).tolist() == words(answer).tolist()


def test_a_number_does_not_depend_on_its_neighbours() -> None:
    seeds, choices, positions = [5, -1, 2**63 - 1, -(2**63)], [0, 1, 2, 3], [0, 7, 2**33, 5]
    together = uniforms(seeds, choices, positions)
    alone = [uniforms([s], [c], [p])[0] for s, c, p in zip(seeds, choices, positions, strict=True)]
    assert together.tolist() == alone


def test_every_argument_counts() -> None:
    base = uniforms([5], [0], [7])[0]
    others = [uniforms([s], [c], [p])[0] for s, c, p in [(6, 0, 7), (5 + 2**32, 0, 7), (5, 1, 7), (5, 0, 8)]]
    assert len({base, *others}) == 5


def test_numbers_are_uniform() -> None:
    """A hundred equal bins over consecutive positions: chi-square of 99 degrees stays below its 99.9 % quantile."""
    count = 100_000
    numbers = uniforms([1234] * count, [0] * count, list(range(count)))
    assert numbers.min() >= 0.0 and numbers.max() < 1.0
    observed = np.bincount((numbers * 100).astype(int), minlength=100)
    assert ((observed - count / 100) ** 2 / (count / 100)).sum() < 148.2
