"""An examination of a bed's hosts, made from inside the first of them.

As a program: runs in that host, takes the hosts as JSON and prints the examination as JSON.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.hosts.bed import Bed
from tests.support.hosts.host import Host

ROOT = Path(__file__).parents[2]


def examine_bed(bed: Bed, *options: str, slots: int = 1) -> dict[str, Any]:
    """``options``: of ``remuda serve``, the model first; none: all hosts, without a model."""
    hosts = [(host.name, host.number, host.setup) for host in bed.hosts]
    command = [sys.executable, "-m", "tests.doctor.examination", json.dumps([hosts, slots, options])]
    done = bed.hosts[0].run(command, timeout_s=110, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def cells(found: dict[str, Any], level: str) -> dict[tuple[str, str], dict[str, str]]:
    """(check, where) → the finding, of those of one level."""
    return {(each["check"], each["where"]): each for each in found["findings"] if each["level"] == level}


def main(hosts: Sequence[tuple[str, int, list[str]]], slots: int, options: Sequence[str]) -> None:
    from cluster.config import load_serve_config
    from cluster.control.preflight import preflight
    from cluster.doctor.examine import examine
    from cluster.doctor.report import as_object
    from tests.support.hosts.calls import NamespaceCalls

    made = []
    for name, number, setup in hosts:
        host = Host(name, number)
        host.setup = setup
        made.append(host)
    flags = dict(zip(options[1::2], options[2::2], strict=True))
    model = {"model": options[0]} if options else {}
    checked = preflight(load_serve_config({**model, **flags, "cpu_slots": 64}))
    found = examine(NamespaceCalls(made, slots, made[0]), checked.launch, checked.model if options else None)
    print(json.dumps(as_object(found)))


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
