"""Devices by name, and those of this host."""

from pathlib import Path

import psutil
import pytest

from cluster.plan.devices import GIB, parse_machines
from cluster.plan.local import available_host_bytes, cpu_ranks, parse_gpus
from engine.errors import InvalidOption


@pytest.mark.parametrize(
    ("text", "num_hosts", "per_host", "name"),
    [
        ("16xH100-80", 2, 8, "H100-80"),
        ("8xh200-141", 1, 8, "H200-141"),
        ("2x4xA100-40", 2, 4, "A100-40"),
        ("1x72xB200-192", 1, 72, "B200-192"),
        ("3xL40S-48", 1, 3, "L40S-48"),
        ("8xcpu-32", 1, 8, "cpu-32"),
        ("4xNewGPU-100", 1, 4, "NewGPU-100"),
    ],
)
def test_machines(text: str, num_hosts: int, per_host: int, name: str) -> None:
    machines = parse_machines(text)
    assert (machines.num_hosts, machines.per_host, machines.device.name) == (num_hosts, per_host, name)
    size = int(name.split("-")[1])
    if name.startswith(("cpu", "New")):
        assert machines.device.usable_bytes == size * GIB
    else:
        # A driver hands out less than the sum of the chips, which itself is counted in decimal or binary.
        assert 0.9 * size * 1e9 < machines.device.usable_bytes < size * GIB
    assert machines.device.is_gpu is (not name.startswith("cpu"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("H100-80", "a number and a device"),
        ("8 H100", "a number and a device"),
        ("8xH100", "did you mean H100-80 or H100-94"),
        ("8xNewGPU", "NewGPU-80; known are"),
        ("12xH100-80", "hosts of 8.*2x6xH100-80"),
        ("0xH100-80", "between 1 and"),
        ("100x100xH100-80", "between 1 and"),
    ],
)
def test_what_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(InvalidOption, match=message):
        parse_machines(text)


def test_the_drivers_answer() -> None:
    """As nvidia-smi prints it; the H100's 81559 MiB less what the driver keeps are the 79.2 GiB that programs see."""
    machines = parse_gpus(["NVIDIA H100 80GB HBM3, 81559, 469", "NVIDIA H100 80GB HBM3, 81559, 551", ""])
    assert machines is not None and machines.per_host == 2
    assert machines.device.usable_bytes == (81559 - 551) * 2**20 and machines.device.name == "H100 80GB HBM3"
    without_reserved = parse_gpus(["Tesla T4, 15360, [N/A]"])
    assert without_reserved is not None and without_reserved.device.usable_bytes == 15360 * 2**20
    assert parse_gpus([]) is None


def test_a_container_bounds_the_hosts_memory(tmp_path: Path) -> None:
    free = psutil.virtual_memory().available
    assert available_host_bytes(tmp_path / "none") == pytest.approx(free, rel=0.2)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.stat").write_text("anon 700\ninactive_file 200\n")
    assert available_host_bytes(tmp_path) == pytest.approx(free, rel=0.2)
    (tmp_path / "memory.max").write_text("5000\n")
    assert available_host_bytes(tmp_path) == 5000 - 1000 + 200
    assert cpu_ranks(4).num_devices == 4
