"""Philox4x32-10, a counter-based random number generator.

Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3" (SC'11). A number is a pure function of a key
and a counter, so nothing has to be kept between steps, moved at a failover or shared within a batch.
"""

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
"""32-bit words, held in 64 bits so that products do not overflow."""

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_BITS = np.uint64(32)
_NUM_ROUNDS = 10
_MASK_64 = 2**64 - 1


def philox4x32(counter: Words, key: Words) -> Words:
    """Ten rounds. ``counter`` [4, n], ``key`` [2, n]: 32-bit words; the answer is [4, n] of the same."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for round_index in range(_NUM_ROUNDS):
        if round_index:
            k0 = (k0 + _WEYL[0]) & _LOW
            k1 = (k1 + _WEYL[1]) & _LOW
        product0 = c0 * _MULTIPLIERS[0]
        product1 = c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (product1 >> _BITS) ^ c1 ^ k0, product1 & _LOW, (product0 >> _BITS) ^ c3 ^ k1, product0 & _LOW
    return np.stack((c0, c1, c2, c3))


def uniforms(seeds: list[int], choices: list[int], positions: list[int]) -> npt.NDArray[np.float64]:
    """One number in [0, 1), of 53 bits, per (seed, choice, position). Key: the seed's 64 bits (two's complement);
    counter: the position's low and high word, the choice, and 0 (a domain: further uses take other numbers)."""
    seed = np.array([value & _MASK_64 for value in seeds], dtype=np.uint64)
    choice = np.array(choices, dtype=np.uint64)
    position = np.array(positions, dtype=np.uint64)
    counter = np.stack((position & _LOW, position >> _BITS, choice & _LOW, np.zeros_like(choice)))
    key = np.stack((seed & _LOW, seed >> _BITS))
    words = philox4x32(counter, key)
    bits = ((words[0] >> np.uint64(5)) << np.uint64(26)) | (words[1] >> np.uint64(6))
    numbers: npt.NDArray[np.float64] = bits.astype(np.float64) * 2.0**-53
    return numbers
