"""Which batch sizes are captured, and which of them a batch is padded to."""

import pytest

from engine.executor.decode_sizes import captured_sizes, size_for


@pytest.mark.parametrize("most", [1, 3, 8, 100, 256, 1000, 1024])
def test_every_batch_finds_a_size_and_few_rows_are_padding(most: int) -> None:
    sizes = captured_sizes(most)
    assert list(sizes) == sorted(set(sizes)) and sizes[-1] == most
    for num_requests in range(1, most + 1):
        size = size_for(num_requests, sizes)
        assert size is not None and num_requests <= size < max(num_requests + 16, num_requests * 1.3)


def test_the_sizes_of_the_default_limit() -> None:
    assert captured_sizes(256) == (1, 2, 4, 8, 16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)


def test_larger_batches_have_none() -> None:
    assert captured_sizes(5000)[-1] == 1024
    assert size_for(1025, captured_sizes(5000)) is None
