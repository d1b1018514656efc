"""Measures the host it runs on. Imports neither torch nor Ray; takes far less than a second without the disk."""

import resource
import shutil
import socket
import subprocess
import time
from pathlib import Path

import msgspec
from huggingface_hub import constants

from cluster.doctor.config import ray_settings, temporary_directory
from cluster.doctor.facts import DOWNLOADS, Checkpoint, Disk, Gpu, HostFacts, HostQuestion
from cluster.doctor.measure_disk import checkpoint_facts, read_rate
from cluster.plan.local import available_host_bytes
from cluster.replica.build import code_digest, versions
from cluster.replica.fabric import SYS, network_interfaces, num_numa_nodes, numa_node, rdma_ports
from cluster.replica.model_source import ModelSource

MIB = 2**20
SHM = "/dev/shm"
UNLIMITED = 2**63 - 1
_LIMITS = {"nofile": resource.RLIMIT_NOFILE, "memlock": resource.RLIMIT_MEMLOCK, "nproc": resource.RLIMIT_NPROC}
_GPU_QUERY = "--query-gpu=name,memory.total,memory.free,pci.bus_id"
_GPU_TIMEOUT_S = 30.0


def measure_host(argument: bytes) -> bytes:
    """HostQuestion → HostFacts, both encoded."""
    question = msgspec.msgpack.decode(argument, type=HostQuestion)
    checkpoint, rate, read_error = _checkpoint(question)
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
        disks=(_disk("temporary files", Path(temporary_directory())), _disk(DOWNLOADS, Path(constants.HF_HUB_CACHE))),
        nics=network_interfaces(),
        hcas=rdma_ports(),
        num_numa_nodes=num_numa_nodes(),
        checkpoint=checkpoint,
        bytes_read_per_s=rate,
        read_error=read_error,
    )
    return msgspec.msgpack.encode(facts)


def tell_time(argument: bytes) -> bytes:
    """The clock, and for how long this function has run: nothing."""
    return msgspec.msgpack.encode(time.time())


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


def _checkpoint(question: HostQuestion) -> tuple[Checkpoint | None, float | None, str | None]:
    """The checkpoint, bytes per second of reading it, and why it cannot be read."""
    if question.model is None:
        return None, None, None
    source = ModelSource(question.model, question.revision)
    found = checkpoint_facts(source, question.checkpoint_bytes)
    if not question.reads_disk or not found.digest:
        return found, None, None
    path = source.cached()
    assert path is not None, "its digest is known"
    try:
        return found, read_rate(path), None
    except OSError as error:
        return found, None, str(error)


def _disk(use: str, path: Path) -> Disk:
    try:
        while not path.exists():
            path = path.parent
        usage = shutil.disk_usage(path)
    except OSError as error:
        return Disk(use, str(path), 0, 0, str(error))
    return Disk(use, str(path), usage.free, usage.total)


def _soft_limit(number: int) -> int:
    soft, _ = resource.getrlimit(number)
    return UNLIMITED if soft == resource.RLIM_INFINITY else soft
