"""What a model is planned on: devices of one kind, equally many on each host."""

import re
from dataclasses import dataclass, replace

from engine.errors import InvalidOption

GIB = 2**30
_MAX_PER_HOST = 8
_MAX_DEVICES = 4096


@dataclass(frozen=True)
class Device:
    """``usable_bytes``: what the driver hands out, which is less than the number in the name. ``bytes_per_s``: at which
    it reads its memory, as published; of a device that is not known a usual figure."""

    name: str
    usable_bytes: int
    is_gpu: bool = True
    bytes_per_s: float = 1e12


_CPU_BYTES_PER_S = 10e9
"""Of one rank, which has one thread."""


def _gpu(name: str, usable_gib: float, gb_per_s: float) -> Device:
    return Device(name, int(usable_gib * GIB), bytes_per_s=gb_per_s * 1e9)


def cpu(name: str, usable_bytes: int) -> Device:
    return Device(name, usable_bytes, is_gpu=False, bytes_per_s=_CPU_BYTES_PER_S)


_KNOWN = {
    device.name.lower(): device
    for device in (
        # The total that the driver reports to a program, the least of what has been seen where versions differ.
        _gpu("A10-24", 22.0, 600),
        _gpu("A100-40", 39.38, 1555),
        _gpu("A100-80", 79.14, 2039),
        _gpu("A40-48", 44.34, 696),
        _gpu("A6000-48", 47.43, 768),
        _gpu("B200-192", 178.35, 8000),
        _gpu("H100-80", 79.1, 3350),
        _gpu("H100-94", 93.02, 3938),
        _gpu("H20-96", 95.0, 4000),
        _gpu("H200-141", 139.7, 4800),
        _gpu("L4-24", 21.95, 300),
        _gpu("L40S-48", 44.32, 864),
        _gpu("MI300X-192", 191.45, 5300),
        _gpu("RTX4090-24", 23.5, 1008),
        _gpu("T4-16", 14.56, 320),
        _gpu("V100-16", 15.77, 900),
        _gpu("V100-32", 31.73, 900),
    )
}


@dataclass(frozen=True)
class Machines:
    """``num_hosts`` hosts with ``per_host`` devices each."""

    device: Device
    num_hosts: int
    per_host: int

    @property
    def num_devices(self) -> int:
        return self.num_hosts * self.per_host

    def __str__(self) -> str:
        hosts = f"{self.num_hosts} × " if self.num_hosts > 1 else ""
        return f"{hosts}{self.per_host} × {self.device.name}"

    def resized(self, num_hosts: int, per_host: int) -> "Machines":
        return replace(self, num_hosts=num_hosts, per_host=per_host)


def parse_machines(text: str) -> Machines:
    """``16xH100-80`` (eight on a host), ``2x4xA100-40`` (hosts × devices), ``8xcpu-32`` (CPU ranks of 32 GiB each).

    A name that is not known needs its size in GiB, as in ``4xNewGPU-100``. Raises InvalidOption.
    """
    match = re.fullmatch(r"(?:(\d+)x)?(\d+)x([a-z][a-z0-9]*(?:-\d+)?)", text.strip(), re.IGNORECASE)
    if match is None:
        raise InvalidOption(
            f"--gpus {text!r} cannot be read; write a number and a device as in 16xH100-80, or hosts first: 2x8xH100-80"
        )
    hosts, count, device = match[1], int(match[2]), _device(match[3])
    if not 1 <= count * int(hosts or 1) <= _MAX_DEVICES:
        raise InvalidOption(f"--gpus {text}: write between 1 and {_MAX_DEVICES} devices")
    if hosts is not None:
        return Machines(device, int(hosts), count)
    if count <= _MAX_PER_HOST:
        return Machines(device, 1, count)
    if count % _MAX_PER_HOST:
        raise InvalidOption(
            f"--gpus {text}: {count} devices do not divide into hosts of {_MAX_PER_HOST}; "
            f"write hosts × devices, as in 2x{count // 2}x{match[3]}"
        )
    return Machines(device, count // _MAX_PER_HOST, _MAX_PER_HOST)


def _device(name: str) -> Device:
    kind, _, size = name.partition("-")
    if kind.lower() == "cpu" and size:
        return cpu(f"cpu-{size}", int(size) * GIB)
    if (known := _KNOWN.get(name.lower())) is not None:
        return known
    sizes = [device.name for key, device in _KNOWN.items() if key.partition("-")[0] == kind.lower()]
    if not size:
        known_names = ", ".join(device.name for device in _KNOWN.values())
        meant = f"; did you mean {' or '.join(sizes)}?" if sizes else f"; known are {known_names}"
        raise InvalidOption(f"--gpus: {name} has no size: write its memory in GiB, as in {name}-80{meant}")
    return Device(name, int(size) * GIB)
