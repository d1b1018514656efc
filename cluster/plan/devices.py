"""What a model is planned on: devices of one kind, equally many on each host."""

import re
from dataclasses import dataclass, replace

from engine.errors import InvalidOption

GIB = 2**30
_MAX_PER_HOST = 8
_MAX_DEVICES = 4096


@dataclass(frozen=True)
class Device:
    """``usable_bytes``: what the driver hands out, which is less than the number in the name."""

    name: str
    usable_bytes: int
    is_gpu: bool = True


def _gpu(name: str, usable_gib: float) -> Device:
    return Device(name, int(usable_gib * GIB))


_KNOWN = {
    device.name.lower(): device
    for device in (
        # The total that the driver reports to a program, the least of what has been seen where versions differ.
        _gpu("A10-24", 22.0),
        _gpu("A100-40", 39.38),
        _gpu("A100-80", 79.14),
        _gpu("A40-48", 44.34),
        _gpu("A6000-48", 47.43),
        _gpu("B200-192", 178.35),
        _gpu("H100-80", 79.1),
        _gpu("H100-94", 93.02),
        _gpu("H20-96", 95.0),
        _gpu("H200-141", 139.7),
        _gpu("L4-24", 21.95),
        _gpu("L40S-48", 44.32),
        _gpu("MI300X-192", 191.45),
        _gpu("RTX4090-24", 23.5),
        _gpu("T4-16", 14.56),
        _gpu("V100-16", 15.77),
        _gpu("V100-32", 31.73),
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
        return Device(f"cpu-{size}", int(size) * GIB, is_gpu=False)
    if (known := _KNOWN.get(name.lower())) is not None:
        return known
    sizes = [device.name for key, device in _KNOWN.items() if key.partition("-")[0] == kind.lower()]
    if not size:
        known_names = ", ".join(device.name for device in _KNOWN.values())
        meant = f"; did you mean {' or '.join(sizes)}?" if sizes else f"; known are {known_names}"
        raise InvalidOption(f"--gpus: {name} has no size: write its memory in GiB, as in {name}-80{meant}")
    return Device(name, int(size) * GIB)
