"""Each check of a host on facts with one fault planted, beside facts with none."""

from collections.abc import Iterable

import pytest

from cluster.doctor import check_hosts, check_network
from cluster.doctor.facts import Checkpoint, Clock, Disk, Gpu, RankFacts
from cluster.doctor.finding import Finding, Level
from cluster.doctor.measure_host import parse_gpus
from cluster.replica.fabric import Nic
from tests.doctor.sample_facts import GIB, H100, adapters, healthy

FIRST, SECOND = "10.0.0.1", "10.0.0.2"


def not_ok(findings: Iterable[Finding]) -> list[tuple[str, str, Level]]:
    found = list(findings)
    assert found, "a check that finds nothing says so by a finding"
    for finding in found:
        assert finding.level is Level.OK or finding.remedy, "what is wrong comes with what to change"
    return [(finding.check, finding.where, finding.level) for finding in found if finding.level is not Level.OK]


def test_a_healthy_cluster_passes_every_check() -> None:
    hosts = [healthy(FIRST), healthy(SECOND)]
    for check in (
        check_hosts.check_versions(hosts),
        check_hosts.check_settings(hosts),
        check_hosts.check_shm(hosts, {FIRST: 8}, on_gpus=True),
        check_hosts.check_limits(hosts),
        check_hosts.check_disks(hosts),
        check_hosts.check_checkpoints(hosts),
        check_hosts.check_read_rates(hosts, {}),
        check_hosts.check_memory(hosts, {FIRST: GIB}),
        check_hosts.check_clocks({SECOND: Clock(0.01, 0.001)}),
        check_network.check_interfaces(hosts),
        check_network.check_numa(hosts, on_gpus=False),
    ):
        assert not_ok(check) == []


def test_the_odd_version_is_named_with_that_of_the_others() -> None:
    odd = healthy("10.0.0.3", versions={**healthy().versions, "torch": "2.11.0"})
    (bad,) = [each for each in check_hosts.check_versions([odd, healthy(FIRST), healthy(SECOND)]) if each.remedy]
    assert (bad.where, bad.level) == ("10.0.0.3", Level.FAIL)
    assert (bad.value, bad.limit) == ("torch 2.11.0", "elsewhere torch 2.13.0")


def test_other_code_under_the_same_version_is_told() -> None:
    hosts = [healthy(FIRST), healthy(SECOND, code_digest="0dd")]
    assert not_ok(check_hosts.check_versions(hosts)) == [("versions", SECOND, Level.FAIL)]


def test_what_a_ray_of_somebody_elses_was_not_told() -> None:
    (bad,) = check_hosts.check_settings([healthy(FIRST, settings={})])
    assert bad.level is Level.WARN
    assert "noticed after 65 s" in bad.value
    for name in (
        "RAY_health_check_",
        "RAY_memory_monitor_refresh_ms=0",
        "RAY_worker_niceness=0",
        "RAY_AUTH_MODE=token",
    ):
        assert name in bad.remedy
    assert check_hosts.notice_seconds(healthy().settings) == 4.5
    assert not_ok(check_hosts.check_settings([healthy("127.0.0.1", settings={})])) == [], "nobody reaches a private one"


@pytest.mark.parametrize(
    ("clock", "level"),
    [
        (Clock(0.2, 0.0), Level.OK),
        (Clock(-1.0, 0.001), Level.WARN),
        (Clock(30.0, 0.5), Level.FAIL),
        # As well explained by how long the answer took.
        (Clock(0.6, 0.6), Level.OK),
    ],
)
def test_a_clock_counts_as_wrong_by_what_is_certain(clock: Clock, level: Level) -> None:
    (finding,) = check_hosts.check_clocks({SECOND: clock})
    assert finding.level is level


def test_a_small_shm() -> None:
    small = [healthy(shm_free_bytes=64 * 2**20)]
    assert not_ok(check_hosts.check_shm(small, {FIRST: 1}, on_gpus=False)) == [("/dev/shm", FIRST, Level.WARN)]
    assert not_ok(check_hosts.check_shm(small, {FIRST: 8}, on_gpus=True)) == [("/dev/shm", FIRST, Level.FAIL)]


def test_few_open_files_and_locked_memory_for_rdma_only() -> None:
    limits = {"nofile": 1024, "memlock": 65536, "nproc": 4096}
    assert not_ok(check_hosts.check_limits([healthy(limits=limits)])) == [("open files", FIRST, Level.WARN)]
    with_rdma = [healthy(limits=limits, hcas=adapters())]
    assert ("locked memory", FIRST, Level.FAIL) in not_ok(check_hosts.check_limits(with_rdma))


def test_a_full_disk_a_slow_disk_and_how_long_loading_takes() -> None:
    full = [healthy(disks=(Disk("temporary files", "/tmp", 0, GIB),))]
    assert not_ok(check_hosts.check_disks(full)) == [("disk for temporary files", FIRST, Level.FAIL)]
    (slow,) = check_hosts.check_read_rates([healthy(bytes_read_per_s=1e8)], {FIRST: 10**9})
    assert (slow.level, slow.value) == (Level.WARN, "100 MB/s, so loading takes 10.0 s")


def test_a_checkpoint_that_is_missing_or_another() -> None:
    hosts = [
        healthy(FIRST),
        healthy(SECOND),
        healthy("10.0.0.3", checkpoint=Checkpoint(error="/models/x is not a directory")),
        healthy("10.0.0.4", checkpoint=Checkpoint("0dd", 999)),
    ]
    assert not_ok(check_hosts.check_checkpoints(hosts)) == [
        ("checkpoint", "10.0.0.3", Level.FAIL),
        ("checkpoint", "10.0.0.4", Level.FAIL),
    ]


def test_too_little_memory_for_the_ranks_of_a_host() -> None:
    hosts = [healthy(FIRST), healthy(SECOND)]
    found = check_hosts.check_memory(hosts, {FIRST: GIB, SECOND: 100 * GIB})
    assert not_ok(found) == [("memory", SECOND, Level.FAIL)]


def test_a_gpu_that_something_else_uses_is_named() -> None:
    taken = Gpu(H100.name, 80 * GIB, 30 * GIB)
    hosts = [healthy(gpus=(H100, taken))]
    (bad,) = check_hosts.check_gpu_memory(hosts, {FIRST: 2}, {}, utilization=0.9)
    assert bad.level is Level.FAIL
    assert bad.value == "1 of 2 GPUs free: GPU 1 has 30.0 GiB free of 80.0 GiB"
    (perhaps,) = check_hosts.check_gpu_memory(hosts, {FIRST: 1}, {}, utilization=0.9)
    assert perhaps.level is Level.WARN, "the rank may get the one that is taken"
    (known,) = check_hosts.check_gpu_memory(hosts, {FIRST: 1}, {FIRST: 1}, utilization=0.9)
    assert known.level is Level.OK, "Ray gave it to another gang, and gives ours the other"
    (none,) = check_hosts.check_gpu_memory([healthy()], {FIRST: 1}, {}, utilization=0.9)
    assert none.level is Level.FAIL


def test_gpus_that_ray_does_not_have_and_ranks_that_would_see_all() -> None:
    hosts = [healthy(gpus=(H100, H100))]
    (hidden,) = check_network.check_visible_devices(hosts, {FIRST: 1})
    assert (hidden.level, hidden.value) == (Level.WARN, "Ray has 1 of 2 GPUs")
    assert not_ok(check_network.check_visible_devices(hosts, {FIRST: 2})) == []
    settings = {**healthy().settings, "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
    all_seen = [healthy(gpus=(H100,), settings=settings)]
    assert not_ok(check_network.check_visible_devices(all_seen, {FIRST: 1})) == [("devices", FIRST, Level.FAIL)]


def test_unequal_gpus_are_priced_and_very_unequal_ones_refused() -> None:
    larger, tiny = Gpu("NVIDIA H200", 141 * GIB, 140 * GIB), Gpu("NVIDIA L4", 22 * GIB, 22 * GIB)
    both = [healthy(FIRST, gpus=(H100,)), healthy(SECOND, gpus=(larger,) * 2)]
    (priced,) = check_network.check_equal_memory(both, {FIRST: 1, SECOND: 2})
    assert (priced.where, priced.level) == (SECOND, Level.WARN)
    assert "122 GiB would lie idle" in priced.value
    unlike = [healthy(FIRST, gpus=(H100,)), healthy(SECOND, gpus=(tiny,))]
    (refused,) = check_network.check_equal_memory(unlike, {FIRST: 1, SECOND: 1})
    assert not_ok(check_network.check_equal_memory(unlike, {FIRST: 1})) == [("equal devices", FIRST, Level.WARN)]
    assert (refused.where, refused.level) == (FIRST, Level.FAIL)


def test_a_slow_rank_is_priced() -> None:
    ranks = [
        RankFacts(0, "H100", "0", 3e12, ()),
        RankFacts(1, "H100", "1", 2e12, ()),
        RankFacts(2, "L4", "0", 3e11, ()),
    ]
    fast, slow, useless = check_network.check_equal_speed(ranks, [FIRST, FIRST, SECOND])
    assert (fast.level, slow.level, useless.level) == (Level.OK, Level.WARN, Level.FAIL)
    assert "lose up to 33% of their speed" in slow.value
    assert useless.where == f"rank 2 ({SECOND})"


def test_the_interface_of_another_network_or_a_slower_one() -> None:
    unused = Nic("eth1", ("10.1.0.1",), 400_000, 9000, True)
    carrier, loopback = healthy().nics
    bridge = Nic("docker0", ("172.17.0.1",), 1_000_000)
    (faster,) = check_network.check_interfaces([healthy(nics=(carrier, unused, bridge, loopback))])
    assert (faster.level, faster.limit) == (Level.WARN, "eth1 has 400,000")
    assert "--node-ip-address=10.1.0.1" in faster.remedy
    (lost,) = check_network.check_interfaces([healthy(nics=(unused, loopback))])
    assert lost.level is Level.FAIL
    wrong = {**healthy().settings, "GLOO_SOCKET_IFNAME": "ib7"}
    (named,) = check_network.check_interfaces([healthy(settings=wrong)])
    assert named.value == "GLOO_SOCKET_IFNAME=ib7 is not there"


def test_one_host_with_small_frames() -> None:
    hosts = [healthy(FIRST), healthy(SECOND), healthy("10.0.0.3", nics=(Nic("eth0", ("10.0.0.3",), 10_000, 1500),))]
    assert not_ok(check_network.check_mtus(hosts)) == [("MTU", "10.0.0.3", Level.WARN)]


def test_adapters_must_be_alike_and_may_be_switched_off_by_mistake() -> None:
    hosts = [healthy(FIRST, hcas=adapters()), healthy(SECOND, hcas=adapters()), healthy("10.0.0.3", hcas=adapters(1))]
    assert not_ok(check_network.check_adapters(hosts)) == [("RDMA", "10.0.0.3", Level.FAIL)]
    off = {**healthy().settings, "NCCL_IB_DISABLE": "1"}
    assert not_ok(check_network.check_adapters([healthy(hcas=adapters(), settings=off)])) == [
        ("RDMA", FIRST, Level.WARN)
    ]


def test_gpus_far_from_every_adapter_and_ranks_spread_over_memories() -> None:
    far = Gpu(H100.name, 80 * GIB, 79 * GIB, "", 1)
    two = healthy(gpus=(H100, far), hcas=adapters(), num_numa_nodes=2)
    (bad,) = check_network.check_numa([two], on_gpus=True)
    assert (bad.level, bad.value) == (Level.WARN, "GPUs 1 have no adapter on their NUMA node")
    (spread,) = check_network.check_numa([healthy(num_numa_nodes=2)], on_gpus=False)
    assert spread.level is Level.WARN


def test_gpus_as_the_driver_lists_them() -> None:
    text = "NVIDIA H200, 143771, 143000, 00000000:1B:00.0\nNVIDIA H200, 143771, 20, 00000000:43:00.0\n"
    first, second = parse_gpus(text)
    assert (first.name, first.total_bytes, second.free_bytes) == ("NVIDIA H200", 143771 * 2**20, 20 * 2**20)
