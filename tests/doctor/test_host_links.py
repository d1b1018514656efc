"""A gang goes where the links are fast: measured on hosts of which one has a slow one, and what a measurement means."""

import msgspec
import pytest

from cluster.doctor.facts import LinkFacts
from cluster.doctor.host_links import message_seconds, rounded
from tests.doctor.placed_gang import placed_on
from tests.support.hosts.fixture import MakeBed


@pytest.mark.netns
@pytest.mark.timeout(60)
def test_stages_avoid_the_host_behind_a_slow_link(make_bed: MakeBed) -> None:
    bed = make_bed(3)
    first, second, third = bed.hosts
    bed.network.limit(second, 40)
    # Without a measurement, hosts without labels are taken in their order.
    assert placed_on(bed, slots=1, pipeline_parallel_size=2) == [first.address, third.address]


def link(**values: float) -> LinkFacts:
    good = LinkFacts(0, 1, channel_s=100e-6, channel_bytes_per_s=1.25e9, lost_share=0.0)
    return msgspec.structs.replace(good, **values)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (link(), 0.5e-3),
        (link(channel_s=300e-6, channel_bytes_per_s=0.6e9), 0.5e-3),
        (link(channel_bytes_per_s=125e6), 2e-3),
        (link(channel_s=10e-3), 2e-3),
        (link(channel_s=20e-3), 8e-3),
        (link(channel_bytes_per_s=5e6), 32e-3),
        (link(lost_share=0.02), 2e-3),
    ],
)
def test_links_of_one_kind_are_equally_far(found: LinkFacts, expected: float) -> None:
    seconds = message_seconds(found)
    assert seconds is not None
    assert rounded(seconds) == pytest.approx(expected)


def test_a_host_that_is_not_reached_is_no_neighbour() -> None:
    assert message_seconds(LinkFacts(0, 1, error="timed out")) is None
    assert message_seconds(LinkFacts(0, 1)) is None
