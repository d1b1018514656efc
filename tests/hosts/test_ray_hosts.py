"""One real Ray cluster over three hosts, started as production starts it and joined from inside one of them."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.control.ray_node import RayNode
from cluster.control.ray_settings import authentication_environment
from tests.hosts.sniffer import Sniffer
from tests.support.hosts.bed import Bed
from tests.support.hosts.fixture import MakeBed

pytestmark = pytest.mark.netns

ROOT = Path(__file__).parents[2]
NUM_SLOTS = 2
DRIVER = """
import json, os, sys
import ray
from cluster.control.interfaces import local_interface_for
from cluster.control.placement import place_gangs
from cluster.control.ray_runtime import RayRuntime
from engine.config import ParallelConfig

@ray.remote(num_cpus=1)
class Rank:
    def look(self):
        address = ray.util.get_node_ip_address()
        return address, local_interface_for(address)

with RayRuntime.join(sys.argv[1]) as runtime:
    hosts = runtime.nodes()
    (gang,) = place_gangs(ParallelConfig(tp=2, dp=3), hosts, on_gpus=False)
    ranks = [Rank.options(resources={f"node:{host.address}": 0.001}).remote() for host in gang]
    print(json.dumps({
        "host": runtime.host,
        "hosts": [[host.address, host.cpu_slots] for host in hosts],
        "placed": [host.address for host in gang],
        "ran": ray.get([rank.look.remote() for rank in ranks]),
    }))
"""


@pytest.fixture(scope="module")
def cluster_of_three(make_bed: MakeBed) -> Iterator[tuple[Bed, list[RayNode], Sniffer]]:
    made = make_bed(3, with_sink=True)
    assert made.sink is not None
    with Sniffer(made.sink) as sniffer:
        nodes = made.start_ray(cpu_slots=NUM_SLOTS)
        roots = [node.paths.root for node in nodes]
        yield made, nodes, sniffer
        made.close()
    assert not any(root.exists() for root in roots)


def test_ranks_run_where_they_were_placed(cluster_of_three: tuple[Bed, list[RayNode], Sniffer]) -> None:
    made, nodes, _ = cluster_of_three
    # Not the head: the driver may run on any host.
    own = made.hosts[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **authentication_environment(nodes[0].token_file)}
    done = own.run([sys.executable, "-c", DRIVER, nodes[0].address], env=environment, timeout_s=90)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    addresses = [host.address for host in made.hosts]
    assert nodes[0].address.startswith(f"{addresses[0]}:")
    assert seen["host"] == own.address
    assert seen["hosts"] == [[address, NUM_SLOTS] for address in (addresses[1], addresses[0], addresses[2])]
    assert seen["placed"] == [addresses[1]] * 2 + [addresses[0]] * 2 + [addresses[2]] * 2
    assert seen["ran"] == [[address, "eth0"] for address in seen["placed"]]


def test_a_host_outside_the_cluster_is_told_where_to_go(
    cluster_of_three: tuple[Bed, list[RayNode], Sniffer], tmp_path: Path
) -> None:
    """Its raylet is gone: the host reaches the cluster, but is not one of its nodes."""
    made, nodes, _ = cluster_of_three
    nodes[2].close()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **authentication_environment(nodes[0].token_file)}
    done = made.hosts[2].run([sys.executable, "-c", DRIVER, nodes[0].address], env=environment, timeout_s=60)
    assert done.returncode != 0
    assert "this host is not a node of that Ray; run remuda serve on one of 10.77.0.1, 10.77.0.2" in done.stderr


def test_three_hosts_send_nothing_out(cluster_of_three: tuple[Bed, list[RayNode], Sniffer]) -> None:
    assert [*map(str, cluster_of_three[2].packets)] == []
