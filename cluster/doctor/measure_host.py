"""Measures the host it runs on. Imports neither torch nor Ray; takes far less than a second without the disk."""

import hashlib
import importlib.util
import platform
import resource
import shutil
import socket
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
from huggingface_hub import constants

from cluster.doctor.config import ray_settings, temporary_directory
from cluster.doctor.facts import Checkpoint, Disk, Gpu, HostFacts, HostQuestion
from cluster.doctor.measure_disk import checkpoint_facts, read_rate
from cluster.plan.local import available_host_bytes
from cluster.replica.fabric import SYS, network_interfaces, num_numa_nodes, numa_node, rdma_ports
from cluster.replica.model_source import ModelSource
from engine.errors import CheckpointError

# Those whose versions decide what ranks compute or how they talk to each other.
PACKAGES = ("remuda", "ray", "torch", "numpy", "safetensors", "msgspec", "grpcio", "protobuf", "tokenizers")
MIB = 2**20
SHM = "/dev/shm"
UNLIMITED = 2**63 - 1
_LIMITS = {"nofile": resource.RLIMIT_NOFILE, "memlock": resource.RLIMIT_MEMLOCK, "nproc": resource.RLIMIT_NPROC}
_GPU_QUERY = "--query-gpu=name,memory.total,memory.free,pci.bus_id"
_GPU_TIMEOUT_S = 30.0


def measure_host(argument: bytes) -> bytes:
    """HostQuestion → HostFacts, both encoded."""
    question = msgspec.msgpack.decode(argument, type=HostQuestion)
    checkpoint, rate = _checkpoint(question)
    facts = HostFacts(
        address=question.address,
        name=socket.gethostname(),
        versions=versions(),
        code_digest=code_digest(),
        settings=ray_settings(),
        available_bytes=available_host_bytes(),
        gpus=gpus(),
        shm_free_bytes=shutil.disk_usage(SHM).free if Path(SHM).is_dir() else 0,
        limits={name: _soft_limit(number) for name, number in _LIMITS.items()},
        disks=(_disk("temporary files", Path(temporary_directory())), _disk("downloads", Path(constants.HF_HUB_CACHE))),
        nics=network_interfaces(),
        hcas=rdma_ports(),
        num_numa_nodes=num_numa_nodes(),
        checkpoint=checkpoint,
        bytes_read_per_s=rate,
    )
    return msgspec.msgpack.encode(facts)


def tell_time(argument: bytes) -> bytes:
    """The clock, and for how long this function has run: nothing."""
    return msgspec.msgpack.encode(time.time())


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def code_digest() -> str:
    """Of our own Python files: two hosts may call different code by one version."""
    digest = hashlib.blake2b(digest_size=8)
    for package in ("cluster", "engine"):
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.submodule_search_locations
        root = Path(spec.submodule_search_locations[0])
        for path in sorted(root.rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def gpus(sys: Path = SYS) -> tuple[Gpu, ...]:
    """As the driver lists them; none where there is no driver."""
    command = ["nvidia-smi", _GPU_QUERY, "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_GPU_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return parse_gpus(answer.stdout, sys)


def parse_gpus(text: str, sys: Path = SYS) -> tuple[Gpu, ...]:
    """``name, total, free, address`` in MiB, a line each."""
    found = []
    for line in filter(str.strip, text.splitlines()):
        name, total, free, address = (part.strip() for part in line.split(","))
        # The driver writes eight digits of the PCI domain, the kernel four.
        device = sys / "bus/pci/devices" / address.lower()[-12:]
        found.append(Gpu(name, int(total) * MIB, int(free) * MIB, address, numa_node(device)))
    return tuple(found)


def _checkpoint(question: HostQuestion) -> tuple[Checkpoint | None, float | None]:
    if question.model is None:
        return None, None
    try:
        directory = ModelSource(question.model, question.revision).directory()
    except CheckpointError as error:
        return Checkpoint(error=str(error)), None
    rate = read_rate(directory) if question.reads_disk else None
    return checkpoint_facts(directory), rate


def _disk(use: str, path: Path) -> Disk:
    while not path.exists():
        path = path.parent
    usage = shutil.disk_usage(path)
    return Disk(use, str(path), usage.free, usage.total)


def _soft_limit(number: int) -> int:
    soft, _ = resource.getrlimit(number)
    return UNLIMITED if soft == resource.RLIM_INFINITY else soft
