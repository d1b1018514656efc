"""``remuda serve`` on a real Ray over three hosts, of which one is far: the stages are put on the other two."""

import os
from pathlib import Path

import pytest

from cluster.control.ray_settings import authentication_environment
from tests.hosts.test_three_hosts import REMUDA, ThreeHosts
from tests.support.hosts.fixture import MakeBed

pytestmark = [pytest.mark.netns, pytest.mark.full, pytest.mark.timeout(240)]


def test_stages_are_put_on_hosts_that_are_near(tmp_path: Path, make_bed: MakeBed) -> None:
    bed, log = make_bed(3), tmp_path / "serve.log"
    first, far, third = bed.hosts
    with log.open("w") as output:
        nodes = bed.start_ray(cpu_slots=1)
        bed.network.delay(far, 10)
        server = first.popen(
            [REMUDA, "serve", "remuda-tiny", "--pp", "2", "--dtype", "float32", "--address", nodes[0].address],
            env={**os.environ, **authentication_environment(nodes[0].token_file)},
            stdout=output.fileno(),
            stderr=output.fileno(),
        )
        served = ThreeHosts(bed, first, server, log)
        served.wait_ready()
        (replica,) = served.remuda("status")["replicas"]
        addresses = [rank["host"].rpartition("(")[2].rstrip(")") for rank in replica["ranks"]]
        assert addresses == [first.address, third.address]
        server.terminate()
        assert server.wait(60) == 0, log.read_text()
