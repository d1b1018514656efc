"""Checks of what hosts are and have. Pure: facts in, findings out."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from cluster.config import is_loopback
from cluster.control.ray_settings import OBJECT_STORE_MEMORY_BYTES
from cluster.doctor.facts import DOWNLOADS, Clock, HostFacts
from cluster.doctor.finding import Finding, Level, least, most

GIB = 2**30
MIB = 2**20
NCCL_SHM_BYTES = 33 * MIB
"""Of /dev/shm, for each GPU rank that talks to others on its host."""
SHM_RESERVE_BYTES = 16 * MIB
CLOCK_WARN_S, CLOCK_FAIL_S = 0.25, 5.0
FILES_WARN, FILES_FAIL = 4096, 512
DISK_WARN_BYTES, DISK_FAIL_BYTES = GIB, 64 * MIB
READ_WARN_BYTES_PER_S, READ_FAIL_BYTES_PER_S = 200e6, 20e6
NOTICE_WARN_S = 15.0
# Ray's own values where the environment does not say otherwise (ray_config_def.h).
_HEALTH_DEFAULTS_MS = {"RAY_health_check_period_ms": 3000, "RAY_health_check_timeout_ms": 10000}
_THRESHOLD = "RAY_health_check_failure_threshold"
_DEFAULT_THRESHOLD = 5
_START = "start Ray there with python -m cluster.control.ray_runtime start"


def check_versions(hosts: Sequence[HostFacts]) -> Iterator[Finding]:
    """Each package must have one version everywhere, and our own code be the same to the byte. The odd one out is who
    differs from most; among equally many, from the first host."""
    packages = list(hosts[0].versions)
    usual = {name: _usual(host.versions.get(name, "missing") for host in hosts) for name in packages}
    usual_code = _usual(host.code_digest for host in hosts)
    for host in hosts:
        odd = [name for name in packages if host.versions.get(name) != usual[name]]
        if odd:
            found = ", ".join(f"{name} {host.versions.get(name, 'missing')}" for name in odd)
            wanted = ", ".join(f"{name} {usual[name]}" for name in odd)
            remedy = "install the same wheels as on the other hosts"
            yield Finding("versions", host.address, Level.FAIL, found, f"elsewhere {wanted}", remedy)
        elif host.code_digest != usual_code:
            yield Finding(
                "versions", host.address, Level.FAIL,
                f"remuda {host.versions['remuda']}, code {host.code_digest}", f"elsewhere code {usual_code}",
                "its files differ though its version does not: install the same wheel as on the other hosts",
            )  # fmt: skip
        else:
            told = f"remuda {host.versions['remuda']}, ray {host.versions['ray']}, torch {host.versions['torch']}"
            yield Finding("versions", host.address, Level.OK, told)


def _usual(values: Iterable[str]) -> str:
    """``most_common`` keeps the order of first appearance among equals."""
    return Counter(values).most_common(1)[0][0]


def notice_seconds(settings: Mapping[str, str]) -> float:
    """How long Ray takes to notice a host that has fallen silent: so many probes fail, each after its interval and its
    own time limit."""
    each_ms = sum(int(settings.get(name, default)) for name, default in _HEALTH_DEFAULTS_MS.items())
    return int(settings.get(_THRESHOLD, _DEFAULT_THRESHOLD)) * each_ms / 1000


def check_settings(hosts: Sequence[HostFacts]) -> Iterator[Finding]:
    """What a Ray that somebody else started should have been told. Of one host that only it can reach, nothing."""
    for host in hosts:
        if is_loopback(host.address):
            yield Finding("Ray's settings", host.address, Level.OK, "private")
            continue
        wrong: list[tuple[str, str]] = []
        if (seconds := notice_seconds(host.settings)) > NOTICE_WARN_S:
            wrong.append((f"a silent host is noticed after {seconds:.0f} s", "RAY_health_check_*"))
        if host.settings.get("RAY_memory_monitor_refresh_ms") != "0":
            wrong.append(("ranks are killed when memory is short", "RAY_memory_monitor_refresh_ms=0"))
        if host.settings.get("RAY_worker_niceness") != "0":
            wrong.append(("whatever else runs there goes before its ranks", "RAY_worker_niceness=0"))
        if host.settings.get("RAY_USAGE_STATS_ENABLED") != "0":
            wrong.append(("use is reported", "RAY_USAGE_STATS_ENABLED=0"))
        if host.settings.get("RAY_AUTH_MODE") != "token":
            wrong.append(("whoever reaches Ray's port can run programs", "RAY_AUTH_MODE=token"))
        if not wrong:
            yield Finding("Ray's settings", host.address, Level.OK, f"notices silence in {seconds:.1f} s")
            continue
        value = "; ".join(text for text, _ in wrong)
        remedy = f"{_START}, or set " + " ".join(setting for _, setting in wrong)
        yield Finding("Ray's settings", host.address, Level.WARN, value, "", remedy)


def check_clocks(clocks: Mapping[str, Clock]) -> Iterator[Finding]:
    """Against this host's. What the measurement leaves uncertain is not held against a clock."""
    for address, clock in clocks.items():
        ahead_s = max(0.0, abs(clock.offset_s) - clock.uncertainty_s)
        level = most(ahead_s, CLOCK_WARN_S, CLOCK_FAIL_S)
        told = f"{clock.offset_s:+.3f} ± {clock.uncertainty_s:.3f} s"
        remedy = "" if level is Level.OK else "let all hosts follow one time server (chrony or systemd-timesyncd)"
        yield Finding("clock", address, level, told, f"at most {CLOCK_WARN_S} s from this host's", remedy)


def check_shm(hosts: Sequence[HostFacts], num_ranks: Mapping[str, int], *, on_gpus: bool) -> Iterator[Finding]:
    """``num_ranks``: on each address. Ray's object store lives there, and NCCL's buffers within a host. CPU ranks share
    memory that has no name, so its size does not bound them."""
    for host in hosts:
        ranks = num_ranks.get(host.address, 0)
        needed = SHM_RESERVE_BYTES + (ranks * NCCL_SHM_BYTES if on_gpus and ranks > 1 else 0)
        # A node that runs holds its object store already.
        level = least(host.shm_free_bytes, needed + OBJECT_STORE_MEMORY_BYTES, needed)
        remedy = "" if level is Level.OK else "make it larger: docker run --shm-size=8g, or mount -o remount,size=8g"
        limit = f"at least {_mib(needed + OBJECT_STORE_MEMORY_BYTES)}"
        yield Finding("/dev/shm", host.address, level, f"{_mib(host.shm_free_bytes)} free", limit, remedy)


def check_limits(hosts: Sequence[HostFacts]) -> Iterator[Finding]:
    for host in hosts:
        files = host.limits["nofile"]
        level = least(files, FILES_WARN, FILES_FAIL)
        remedy = "" if level is Level.OK else f"ulimit -n {FILES_WARN * 16} before Ray is started"
        yield Finding("open files", host.address, level, f"{files:,}", f"at least {FILES_WARN:,}", remedy)
        if any(port.is_active for port in host.hcas):
            locked = host.limits["memlock"]
            level = Level.OK if locked >= host.available_bytes else Level.FAIL
            remedy = "" if level is Level.OK else "ulimit -l unlimited before Ray is started: RDMA pins its memory"
            value = "unlimited" if locked >= 2**62 else _mib(locked)
            yield Finding("locked memory", host.address, level, value, "unlimited, for RDMA", remedy)


def check_disks(hosts: Sequence[HostFacts]) -> Iterator[Finding]:
    for host in hosts:
        for disk in host.disks:
            if disk.error is not None:
                remedy = "let the user that Ray runs as read and write there, or name another place"
                yield Finding(f"disk for {disk.use}", host.address, Level.FAIL, disk.error, "", remedy)
                continue
            level = least(disk.free_bytes, DISK_WARN_BYTES, DISK_FAIL_BYTES)
            remedy = "" if level is Level.OK else f"make room under {disk.path}"
            limit = f"at least {_mib(DISK_WARN_BYTES)}"
            value = f"{_mib(disk.free_bytes)} free under {disk.path}"
            yield Finding(f"disk for {disk.use}", host.address, level, value, limit, remedy)


def check_checkpoints(hosts: Sequence[HostFacts]) -> Iterator[Finding]:
    """Every host has it, and the same; or has room for what it will download of a hub's model."""
    there = [host.checkpoint.digest for host in hosts if host.checkpoint and host.checkpoint.digest]
    usual = _usual(there) if there else ""
    for host in hosts:
        if host.checkpoint is None:
            continue
        if host.checkpoint.error is not None:
            remedy = "put the checkpoint under the same path on every host"
            yield Finding("checkpoint", host.address, Level.FAIL, host.checkpoint.error, "", remedy)
        elif host.checkpoint.bytes_to_download is not None:
            yield _download(host, host.checkpoint.bytes_to_download)
        elif host.checkpoint.digest != usual:
            yield Finding(
                "checkpoint", host.address, Level.FAIL,
                f"{host.checkpoint.num_bytes:,} bytes, files {host.checkpoint.digest}", f"elsewhere files {usual}",
                "copy the checkpoint anew: names, sizes or the manifest differ",
            )  # fmt: skip
        else:
            yield Finding("checkpoint", host.address, Level.OK, f"{host.checkpoint.num_bytes:,} bytes")


def _download(host: HostFacts, num_bytes: int) -> Finding:
    disk = next(disk for disk in host.disks if disk.use == DOWNLOADS)
    level, remedy = Level.WARN, "download it there before, and the start takes no longer than on the other hosts"
    if num_bytes + DISK_FAIL_BYTES > disk.free_bytes:
        level = Level.FAIL
        remedy = f"make room under {disk.path}, or set HF_HOME to a larger disk before Ray is started"
    value, limit = f"{num_bytes:,} bytes will be downloaded", f"{disk.free_bytes:,} free under {disk.path}"
    return Finding("checkpoint", host.address, level, value, limit, remedy)


def check_read_rates(hosts: Sequence[HostFacts], bytes_read: Mapping[str, int]) -> Iterator[Finding]:
    """``bytes_read``: what the ranks of each address will read; tells how long that takes."""
    for host in hosts:
        if host.read_error is not None:
            remedy = "see that its files can be read there: the disk, the mount, their owner"
            yield Finding("disk read", host.address, Level.FAIL, host.read_error, "", remedy)
        if host.bytes_read_per_s is None:
            continue
        rate = host.bytes_read_per_s
        level = least(rate, READ_WARN_BYTES_PER_S, READ_FAIL_BYTES_PER_S)
        value = f"{rate / 1e6:,.0f} MB/s"
        if (num_bytes := bytes_read.get(host.address)) is not None:
            value += f", so loading takes {num_bytes / rate:,.1f} s"
        remedy = "" if level is Level.OK else "put the checkpoint on a local disk of that host"
        yield Finding(
            "disk read", host.address, level, value, f"at least {READ_WARN_BYTES_PER_S / 1e6:.0f} MB/s", remedy
        )


def check_memory(hosts: Sequence[HostFacts], bytes_needed: Mapping[str, int]) -> Iterator[Finding]:
    """``bytes_needed``: by all CPU ranks of an address together."""
    for host in hosts:
        needed = bytes_needed.get(host.address, 0)
        level = Level.FAIL if needed > host.available_bytes else Level.OK
        remedy = "" if level is Level.OK else "free memory there, lower --kv-cache-memory, or use more hosts"
        limit = f"its ranks need {_mib(needed)}" if needed else ""
        yield Finding("memory", host.address, level, f"{_mib(host.available_bytes)} available", limit, remedy)


def check_gpu_memory(
    hosts: Sequence[HostFacts], num_ranks: Mapping[str, int], num_used: Mapping[str, int], utilization: float
) -> Iterator[Finding]:
    """Each address's ``num_ranks`` need as many GPUs with so much free; ``num_used`` are Ray's already. One that
    something else uses may be given to a rank even where enough others are free."""
    for host in hosts:
        free = [gpu.free_bytes >= utilization * gpu.total_bytes for gpu in host.gpus]
        level = Level.OK
        if sum(free) < max(1, num_ranks.get(host.address, 0)):
            level = Level.FAIL
        elif len(free) - sum(free) > num_used.get(host.address, 0):
            level = Level.WARN
        taken = "; ".join(f"GPU {number} has {_mib(gpu.free_bytes)} free of {_mib(gpu.total_bytes)}"
                          for number, gpu in enumerate(host.gpus) if not free[number])  # fmt: skip
        value = f"{sum(free)} of {len(free)} GPUs free" + (f": {taken}" if taken else "")
        remedy = "" if level is Level.OK else "end what uses them (nvidia-smi), or lower --gpu-memory-utilization"
        yield Finding("memory", host.address, level, value, f"{utilization:.0%} of each must be free", remedy)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:,.1f} GiB" if num_bytes >= 10 * GIB else f"{num_bytes / MIB:,.0f} MiB"
