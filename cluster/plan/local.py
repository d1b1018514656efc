"""The devices and the memory of this host."""

import subprocess
from collections.abc import Iterable
from pathlib import Path

import psutil

from cluster.plan.devices import Device, Machines, cpu

_QUERY = "--query-gpu=name,memory.total,memory.reserved"
_TIMEOUT_S = 30.0
_CGROUP = Path("/sys/fs/cgroup")


def this_machine() -> Machines:
    """Its GPUs; where there are none, one CPU rank."""
    return local_gpus() or cpu_ranks(1)


def local_gpus() -> Machines | None:
    """None where there is none, or the driver does not tell."""
    return parse_gpus(_ask_driver())


def cpu_ranks(count: int) -> Machines:
    """That share the memory which this host has available now."""
    return Machines(cpu("cpu", available_host_bytes() // count), 1, count)


def parse_gpus(lines: Iterable[str]) -> Machines | None:
    """From nvidia-smi's answer, ``name, total, reserved`` in MiB a line; the smallest counts where they differ."""
    found = [[part.strip() for part in line.split(",")] for line in lines if line.strip()]
    if not found:
        return None
    # A driver that does not know what it keeps for itself says [N/A].
    sizes = [int(total) - (int(kept) if kept.isdecimal() else 0) for _, total, kept in found]
    return Machines(Device(found[0][0].replace("NVIDIA ", ""), min(sizes) * 2**20), 1, len(found))


def _ask_driver() -> list[str]:
    command = ["nvidia-smi", _QUERY, "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return answer.stdout.splitlines()


def available_host_bytes(cgroup: Path = _CGROUP) -> int:
    """What the kernel could give to new processes without swapping, within the limit of this container."""
    available: int = psutil.virtual_memory().available
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return available
    if not limit.isdecimal():
        return available
    # Pages of files that nobody uses at the moment are given back first.
    return max(0, min(available, int(limit) - used + int(statistics.get("inactive_file", 0))))
