"""What ``remuda serve`` says before it starts, of options that will not do what their user may think."""

from dataclasses import replace

import msgspec
import pytest

from cluster.cli.serve_run import notices_of
from cluster.config import Device, ServeConfig
from cluster.control.preflight import Preflight, preflight


def checked(num_spares: int, device: Device) -> Preflight:
    """As if this machine had the device."""
    found = preflight(ServeConfig(model="remuda-tiny", spare_ranks=num_spares, device=Device.CPU))
    plan = msgspec.structs.replace(found.launch.replica, device=device)
    return replace(found, launch=msgspec.structs.replace(found.launch, replica=plan))


@pytest.mark.parametrize(
    ("num_spares", "device", "is_told"), [(1, "cuda", True), (0, "cuda", False), (1, "cpu", False)]
)
def test_spares_that_there_will_not_be_are_told_of(num_spares: int, device: str, is_told: bool) -> None:
    notices = notices_of(checked(num_spares, Device(device)))
    assert any("--spare-ranks has no effect" in notice for notice in notices) == is_told
