"""Facts of a host at which nothing is wrong, to plant one fault at a time in."""

import msgspec

from cluster.doctor.facts import Checkpoint, Disk, Gpu, HostFacts
from cluster.replica.fabric import Hca, Nic

GIB = 2**30
H100 = Gpu("NVIDIA H100 80GB HBM3", 80 * GIB, 79 * GIB, "00000000:1B:00.0", 0)


def healthy(address: str = "10.0.0.1", **changed: object) -> HostFacts:
    facts = HostFacts(
        address=address,
        name="host",
        versions={"python": "3.11.7", "remuda": "0.1.0", "ray": "2.60.0", "torch": "2.13.0"},
        code_digest="c0de",
        settings={
            "RAY_health_check_period_ms": "500",
            "RAY_health_check_timeout_ms": "1000",
            "RAY_health_check_failure_threshold": "3",
            "RAY_memory_monitor_refresh_ms": "0",
            "RAY_worker_niceness": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
        },
        available_bytes=64 * GIB,
        gpus=(),
        shm_free_bytes=8 * GIB,
        limits={"nofile": 65536, "memlock": 2**63 - 1, "nproc": 4096},
        disks=(Disk("temporary files", "/tmp", 100 * GIB, 200 * GIB),),
        nics=(Nic("eth0", (address,), 100_000, 9000, True, 0), Nic("lo", ("127.0.0.1",), None, 65536)),
        hcas=(),
        num_numa_nodes=1,
        checkpoint=Checkpoint("d1ge57", 1000),
        bytes_read_per_s=2e9,
    )
    return msgspec.structs.replace(facts, **changed)


def adapters(num_active: int = 2, rate: float = 400.0, kind: str = "InfiniBand") -> tuple[Hca, ...]:
    """Two of them on NUMA node 0, up to ``num_active`` of them active, and a slow one of the management network."""
    fast = tuple(Hca(f"mlx5_{n}", 1, n < num_active, rate, kind, f"ib{n}", 0) for n in range(2))
    return (*fast, Hca("mlx5_9", 1, True, 25.0, "Ethernet", "eth9", 0))
