"""Which batch sizes of pure decoding steps are captured as CUDA graphs, and which of them serves a batch."""

import bisect
from collections.abc import Sequence

_SMALL = (1, 2, 4, 8)
_STEPS = ((16, 16, 128), (160, 32, 256), (320, 64, 1024))
"""(first, step, last): sizes lie closer where a padded row costs a larger share of the step."""


def captured_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Ascending; the last is ``max_num_seqs``, or 1024 where that is less."""
    sizes = [*_SMALL, *(size for first, step, last in _STEPS for size in range(first, last + 1, step))]
    largest = min(max_num_seqs, sizes[-1])
    return (*(size for size in sizes if size < largest), largest)


def size_for(num_requests: int, sizes: Sequence[int]) -> int | None:
    """The least that is no smaller, of ``sizes`` ascending; None where there is none."""
    place = bisect.bisect_left(sizes, num_requests)
    return sizes[place] if place < len(sizes) else None
