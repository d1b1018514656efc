"""``--replicas``: the ranks of every gang are measured, each with those of its own."""

import pytest

from tests.doctor.examination import examine_bed
from tests.support.hosts.fixture import MakeBed


@pytest.mark.netns
@pytest.mark.full
@pytest.mark.timeout(180)
def test_the_links_of_both_gangs_are_measured(make_bed: MakeBed) -> None:
    bed = make_bed(2)
    options = ("replicas", "2", "tensor_parallel_size", "2", "dtype", "float32")
    found = examine_bed(bed, "remuda-tiny", *options, slots=2)
    assert [(link["first"], link["second"], link["error"]) for link in found["links"]] == [(0, 1, None), (2, 3, None)]
    assert [(rank["host"], rank["replica"]) for rank in found["ranks"]] == [
        ("10.77.0.1", 0),
        ("10.77.0.1", 0),
        ("10.77.0.2", 1),
        ("10.77.0.2", 1),
    ]
    speeds = [each["where"] for each in found["findings"] if each["check"] == "device speed"]
    assert speeds == [f"rank {rank} (10.77.0.{rank // 2 + 1})" for rank in range(4)]
