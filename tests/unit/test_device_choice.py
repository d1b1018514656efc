"""Where ``--device`` is left open: this host decides for its own Ray, a cluster's hosts for that which is joined."""

from pathlib import Path

import pytest

from cluster.config import Device, load_serve_config
from cluster.control.device_choice import with_device
from cluster.control.placement import HostInfo
from cluster.control.preflight import local_device, preflight
from cluster.replica.events import LaunchConfig, decode_config, encode_config
from engine.errors import InvalidOption

JOINED = {"address": "10.0.0.1:6379"}
WITHOUT_GPUS = HostInfo("a", "10.0.0.1", 8)
WITH_GPUS = HostInfo("b", "10.0.0.2", 0, num_gpus=8, used_gpus=8)


def launched(**options: str | int) -> LaunchConfig:
    """As the control process gets it."""
    return decode_config(encode_config(preflight(load_serve_config({**JOINED, **options})).launch))


def test_a_joined_cluster_decides_by_its_own_gpus() -> None:
    launch = launched()
    on_cpus, on_gpus = with_device(launch, [WITHOUT_GPUS]), with_device(launch, [WITHOUT_GPUS, WITH_GPUS])
    assert (on_cpus.replica.device, on_gpus.replica.device) == ("cpu", "cuda")
    # What depends on the device follows it.
    assert on_gpus.replica.max_num_seqs > on_cpus.replica.max_num_seqs
    assert on_gpus.replica.depth > on_cpus.replica.depth
    assert on_gpus.on_gpus is None and on_cpus.on_gpus is None


def test_a_device_that_was_named_stays() -> None:
    for device in ("cpu", "cuda"):
        assert with_device(launched(device=device), [WITHOUT_GPUS, WITH_GPUS]).replica.device == device


def test_limits_that_only_cpus_meet_by_default_do_not_refuse_the_start() -> None:
    launch = launched(max_num_batched_tokens=64)
    assert with_device(launch, [WITH_GPUS]).replica.max_num_seqs == 64


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this host has GPUs")
def test_without_a_cluster_this_host_decides() -> None:
    assert local_device(Device.AUTO) is Device.CPU
    with pytest.raises(InvalidOption, match="no NVIDIA driver"):
        preflight(load_serve_config({"device": "cuda"}))
