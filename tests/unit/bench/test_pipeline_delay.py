"""``make bench-pipeline`` judges the number of micro-batches that is served, not the best of all."""

from bench.pipeline_delay import SERVED_DEPTH, is_missed, shares_kept


def test_another_depth_that_keeps_more_does_not_hide_a_miss() -> None:
    found = {1: {0.0: [100.0, 90.0], 5.0: [95.0]}, SERVED_DEPTH: {0.0: [80.0], 5.0: [70.0, 72.0, 30.0]}}
    assert SERVED_DEPTH == 2
    assert shares_kept(found) == {1: 1.0, 2: 70 / 95}
    assert is_missed(found)
    assert not is_missed({**found, SERVED_DEPTH: {0.0: [95.0], 5.0: [77.0]}})
