"""Ranks' cores on hosts with several NUMA nodes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.replica.cores import cores_of
from cluster.replica.fabric import numa_cores

TWO = [[0, 1, 4, 5], [2, 3, 6, 7]]
BIND = """
import sys
from pathlib import Path
import psutil
from cluster.replica.cores import bind_to_cores
from engine.executor.worker_config import WorkerConfig
config = WorkerConfig(rank=3, channel_address="", secret="", model="", host_ranks=(2, 3), device=sys.argv[2])
bind_to_cores(config, Path(sys.argv[1]))
print(psutil.Process().cpu_affinity())
"""


@pytest.mark.parametrize(
    ("num_ranks", "allowed", "expected"),
    [
        (2, range(8), TWO),
        (4, range(8), [TWO[0], TWO[0], TWO[1], TWO[1]]),
        (3, range(8), [TWO[0], TWO[0], TWO[1]]),
        (1, range(8), [[]]),
        (2, [0, 1, 4], [[], []]),
        (2, [4, 6], [[4], [6]]),
    ],
)
def test_small_hosts(num_ranks: int, allowed: list[int], expected: list[list[int]]) -> None:
    assert [cores_of(index, num_ranks, TWO, allowed) for index in range(num_ranks)] == expected


@given(num_nodes=st.integers(1, 8), num_ranks=st.integers(1, 16), allowed=st.sets(st.integers(0, 31), min_size=1))
def test_nodes_get_equal_runs_of_ranks(num_nodes: int, num_ranks: int, allowed: set[int]) -> None:
    nodes = [list(range(node, 32, num_nodes)) for node in range(num_nodes)]
    chosen = [cores_of(index, num_ranks, nodes, sorted(allowed)) for index in range(num_ranks)]
    usable = [sorted(set(node) & allowed) for node in nodes if set(node) & allowed]
    if len(usable) == 1 or num_ranks < len(usable):
        assert not any(chosen)
        return
    assert [cores for index, cores in enumerate(chosen) if index == 0 or cores != chosen[index - 1]] == usable
    counts = [chosen.count(cores) for cores in usable]
    assert max(counts) - min(counts) <= 1


def plant(sys_directory: Path, *lists: str) -> None:
    for node, text in enumerate(lists):
        file = sys_directory / f"devices/system/node/node{node}/cpulist"
        file.parent.mkdir(parents=True)
        file.write_text(f"{text}\n")


def test_the_kernels_lists(tmp_path: Path) -> None:
    plant(tmp_path, "0-1,4", "2-3", "")
    assert numa_cores(tmp_path) == [[0, 1, 4], [2, 3], []]
    assert numa_cores(tmp_path / "none") == []


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_a_process_is_bound_to_its_node(tmp_path: Path) -> None:
    first, second, *_ = allowed = sorted(os.sched_getaffinity(0))
    plant(tmp_path, str(first), str(second))

    def bound(device: str) -> str:
        command = [sys.executable, "-c", BIND, str(tmp_path), device]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert bound("cpu") == str([second])
    assert bound("cuda") == str(allowed)
