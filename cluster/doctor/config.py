"""What the environment of a process on a host tells: the settings that Ray there was started with."""

import os

from cluster.control.ray_settings import CHECKED_SETTINGS

_OF_COLLECTIVES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_IB_DISABLE")
_OF_DEVICES = ("RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES",)


def ray_settings() -> dict[str, str]:
    """Those of the variables that matter which are set. A worker of Ray has its node's environment."""
    names = (*CHECKED_SETTINGS, *_OF_COLLECTIVES, *_OF_DEVICES)
    return {name: os.environ[name] for name in names if name in os.environ}


def visible_devices() -> str:
    return os.environ.get("CUDA_VISIBLE_DEVICES", "")


def temporary_directory() -> str:
    """As it was meant: Python's own choice passes over one that is full."""
    return os.environ.get("TMPDIR", "/tmp")


def quiet_torch() -> None:
    """Before torch is imported: its store warns on the terminal that it has no name for its own address."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
