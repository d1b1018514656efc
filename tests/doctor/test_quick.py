"""The quick part on one host, as every ``remuda serve`` runs it."""

import time
from collections.abc import Sequence

from cluster.config import load_serve_config
from cluster.control.host_calls import HostAnswer, HostCall
from cluster.control.placement import HostInfo
from cluster.control.preflight import preflight
from cluster.doctor.quick import examine_quickly
from cluster.replica.events import MemoryPlanned


class OneHost:
    """A private Ray's only host: nothing is asked of another process."""

    host = "127.0.0.1"

    def nodes(self) -> list[HostInfo]:
        return [HostInfo("only", self.host, 2)]

    def call(self, calls: Sequence[HostCall], timeout_s: float) -> list[HostAnswer]:
        assert not calls
        return []


def test_the_quick_part_takes_less_than_a_second_on_one_host() -> None:
    plan = preflight(load_serve_config({"tensor_parallel_size": 2, "cpu_slots": 2})).launch.replica
    gang = OneHost().nodes() * 2
    begun_s = time.monotonic()
    warnings = examine_quickly(OneHost(), plan, [gang], MemoryPlanned([10**6] * 2, None))
    assert time.monotonic() - begun_s < 1
    assert not [warning for warning in warnings if "Ray's settings" in warning or "clock" in warning]
