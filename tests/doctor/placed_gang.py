"""Where ``remuda serve`` would put a gang on a bed's hosts, asked from inside the first of them.

As a program: takes the hosts as JSON and prints each rank's address as JSON.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.support.hosts.bed import Bed
from tests.support.hosts.host import Host

ROOT = Path(__file__).parents[2]


def placed_on(bed: Bed, *, slots: int, **options: int) -> list[str]:
    """``options``: of ``remuda serve``."""
    hosts = [(host.name, host.number) for host in bed.hosts]
    command = [sys.executable, "-m", "tests.doctor.placed_gang", json.dumps([hosts, slots, options])]
    done = bed.hosts[0].run(command, timeout_s=60, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    addresses: list[str] = json.loads(done.stdout)
    return addresses


def main(hosts: Sequence[tuple[str, int]], slots: int, options: dict[str, int]) -> None:
    from cluster.config import load_serve_config
    from cluster.control.nearby import place_nearby
    from cluster.control.preflight import preflight
    from cluster.doctor.host_links import measure_host_links
    from tests.support.hosts.calls import NamespaceCalls

    made = [Host(name, number) for name, number in hosts]
    launch = preflight(load_serve_config({**options, "cpu_slots": 64})).launch
    (gang,), _ = place_nearby(NamespaceCalls(made, slots, made[0]), launch, measure_host_links)
    print(json.dumps([host.address for host in gang]))


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
