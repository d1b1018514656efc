"""A group of three as the LeaderWorkerSet controller runs it, acted out in namespaces from the rendered chart.

The pods' own command lines and variables, and in front the rendered front-end pod, which finds the leader through a
mock API server by the kubernetes package. What the controllers of LeaderWorkerSets, pods and EndpointSlices do, the
test does. Front end and leader show each other certificates.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography import x509

from tests.chart.rendering import FULLNAME, NAMESPACE, merged, only, preset, render
from tests.identity.authority import Authority
from tests.support.front_pod import FrontPod, is_whole
from tests.support.hosts.bed import Bed
from tests.support.hosts.fixture import MakeBed
from tests.support.hosts.host import Host
from tests.support.kubelet import Kubelet
from tests.support.mock_cluster import MockCluster, endpoint, mock_cluster

pytestmark = [pytest.mark.netns, pytest.mark.full]

NUM_HOSTS = 3
NUM_TOKENS = 400
VALUES = merged(
    preset("cpu-demo"),
    {
        "parallel": {"tensor": 1, "expert": 1, "pipeline": NUM_HOSTS},
        "engine": {"mode": "lws", "hosts": NUM_HOSTS, "devicesPerHost": 1, "kvCacheMemory": "64MiB"},
        "sizing": None,
        "tls": {"internal": {"enabled": True, "existingSecret": "internal"}},
    },
)
LEADER = f"{FULLNAME}-engine-0"
LEADER_DNS_NAME = f"{LEADER}.{FULLNAME}-engine.{NAMESPACE}"


class Group:
    """The pods of one group, and the front end's; the leader pod's host changes when the group is made anew."""

    def __init__(self, bed: Bed, directory: Path, cluster: MockCluster) -> None:
        documents = render(VALUES)
        template = only(documents, "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]
        assert template["size"] == NUM_HOSTS and template["restartPolicy"] == "None"
        self._leader_pod, self._worker_pod = template["leaderTemplate"], template["workerTemplate"]
        self.cluster = cluster
        self.leader, *self.workers = bed.hosts[:NUM_HOSTS]
        authority = Authority("internal")
        certificate, key = authority.issue("remuda", x509.DNSName("remuda-cluster"))
        internal = {"tls.crt": certificate, "tls.key": key, "ca.crt": authority.pem}
        self.kubelet = Kubelet(documents, bed, directory, {"internal": internal}, cluster)
        self.front = FrontPod(self.kubelet, documents, bed.hosts[NUM_HOSTS], cluster.host, directory)
        cluster.make_slice(only(documents, "Service", "leaders"), self._leader_pod)

    def start_pod(self, index: int) -> None:
        """With the variables that the controller sets."""
        template = self._worker_pod if index else self._leader_pod
        host = self.workers[index - 1] if index else self.leader
        self.kubelet.start(
            template,
            host,
            "engine",
            f"{LEADER}-{index}" if index else LEADER,
            LWS_LEADER_ADDRESS=LEADER_DNS_NAME,
            LWS_GROUP_SIZE=str(NUM_HOSTS),
            LWS_WORKER_INDEX=str(index),
        )

    def start(self) -> None:
        """All pods, the leader's first, as startupPolicy LeaderCreated says."""
        self.kubelet.name(self.leader.address, LEADER_DNS_NAME)
        for index in range(NUM_HOSTS):
            self.start_pod(index)

    def is_ready(self) -> bool:
        return self.kubelet.probe(self._leader_pod, self.leader, "engine")

    def until_served(self) -> None:
        """Its readiness is what puts the leader into the slice."""
        self.kubelet.until(self.is_ready)
        assert all(self.kubelet.probe(self._worker_pod, host, "engine") for host in self.workers)
        self.cluster.set_endpoints(endpoint(LEADER, self.leader))
        self.kubelet.until(self.front.is_ready)

    def pids(self) -> list[int]:
        """Of the ranks in order, each on its host."""
        (replica,) = self.front.replicas().values()
        pids = [int(rank["pid"]) for rank in replica["ranks"]]
        for pid, host in zip(pids, (self.leader, *self.workers), strict=True):
            assert pid in host.pids()
        return pids


@contextmanager
def served_group(make_bed: MakeBed, directory: Path) -> Iterator[tuple[Group, Host]]:
    """The group and its front end as they serve, and a host where a leader pod can be made anew."""
    bed = make_bed(NUM_HOSTS + 3)
    spare, master = bed.hosts[NUM_HOSTS + 1 :]
    with mock_cluster(master, directory) as cluster:
        group = Group(bed, directory, cluster)
        group.start()
        group.front.start()
        group.until_served()
        yield group, spare
        group.kubelet.stop()


@pytest.mark.timeout(290)
def test_a_group_of_three_outlives_a_worker_pod_and_is_made_anew_with_its_leader(
    make_bed: MakeBed, tmp_path: Path
) -> None:
    with served_group(make_bed, tmp_path) as (group, spare):
        group.front.check_answer()
        _worker_pod_dies(group)
        _leader_pod_dies(group, spare)
        path = f"/apis/discovery.k8s.io/v1/namespaces/{NAMESPACE}/endpointslices"
        assert group.cluster.asked() == {path}, "what the chart's Role allows, and nothing else"


def _worker_pod_dies(group: Group) -> None:
    before = group.pids()
    stream = group.front.stream(NUM_TOKENS)
    group.front.until_streaming([stream])
    group.kubelet.kill(group.workers[1])
    group.kubelet.until(lambda: not group.is_ready())
    group.start_pod(2)
    group.front.check_answer()  # it waits
    after = group.pids()
    assert after[:2] == before[:2] and after[2] != before[2], "survivors stay"
    _, _, body = stream.end()
    assert is_whole(body), body[-500:]


def _leader_pod_dies(group: Group, spare: Host) -> None:
    stream = group.front.stream(NUM_TOKENS)
    group.front.until_streaming([stream])
    group.kubelet.kill(group.leader)
    group.kubelet.until(lambda: not group.front.is_ready())
    group.front.check_refusal()
    group.cluster.set_endpoints()
    group.front.check_refusal()
    # The group's other pods belong to the leader pod, and are ended with it.
    group.kubelet.end(*group.workers)
    group.leader = spare
    group.start()
    group.until_served()
    group.front.check_answer()
    assert len(group.pids()) == NUM_HOSTS
    # What ran waits for a leader, though not for ever.
    _, _, body = stream.end()
    assert is_whole(body) or "the request could not be finished" in body[-500:], body[-500:]
