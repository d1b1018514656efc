"""A node that will be emptied, from the mock API server to clients: the chart's front-end pod with --watch-nodes before
two replicas of one pod each, acted out in namespaces. No request may fail."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.chart.rendering import FULLNAME, NAMESPACE, merged, only, preset, render
from tests.support.front_pod import Call, FrontPod, is_whole, text_of
from tests.support.hosts.fixture import MakeBed
from tests.support.hosts.host import Host
from tests.support.kubelet import Kubelet
from tests.support.mock_cluster import MockCluster, endpoint, mock_cluster

pytestmark = [pytest.mark.netns, pytest.mark.full]

FIRST, SECOND = f"{FULLNAME}-engine-0", f"{FULLNAME}-engine-1"
NODE_OF = {FIRST: "node-a", SECOND: "node-b"}
VALUES = merged(
    preset("cpu-demo"),
    {
        # The text of a stream that moves is held against one that did not.
        "model": {"extraArgs": ["--deterministic"]},
        "parallel": {"tensor": 1, "expert": 1},
        "engine": {"mode": "lws", "replicas": 2, "devicesPerHost": 1, "kvCacheMemory": "64MiB"},
        "rbac": {"watchNodes": True},
        "sizing": None,
    },
)
NUM_TOKENS = 1500


class Release:
    """Two leaders, each on its node, and a front end."""

    def __init__(self, hosts: dict[str, Host], front: FrontPod, kubelet: Kubelet, cluster: MockCluster) -> None:
        self.hosts, self.front, self.kubelet, self.cluster = hosts, front, kubelet, cluster

    def until_states(self, **states: str) -> None:
        wanted = {f"{FULLNAME}-engine-{name[1:]}": state for name, state in states.items()}
        self.kubelet.until(lambda: {name: one["state"] for name, one in self.front.replicas().items()} == wanted)

    def num_steps(self) -> dict[str, int]:
        """So far, by replica."""
        return {name: int(one["num_steps"]) for name, one in self.front.replicas().items()}

    def set_endpoints(self, *names: str) -> None:
        self.cluster.set_endpoints(*(endpoint(name, self.hosts[name], NODE_OF[name]) for name in names))


@contextmanager
def served(make_bed: MakeBed, directory: Path) -> Iterator[Release]:
    documents = render(VALUES)
    pod = only(documents, "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]["leaderTemplate"]
    bed = make_bed(4)
    first, second, front_host, master = bed.hosts
    hosts = {FIRST: first, SECOND: second}
    with mock_cluster(master, directory) as cluster:
        kubelet = Kubelet(documents, bed, directory, cluster=cluster)
        cluster.make_slice(only(documents, "Service", "leaders"), pod)
        for name, host in hosts.items():
            cluster.make_node(NODE_OF[name])
            kubelet.start(pod, host, "engine", name, NODE_OF[name], LWS_GROUP_SIZE="1", LWS_WORKER_INDEX="0")
        front = FrontPod(kubelet, documents, front_host, master, directory)
        front.start()
        kubelet.until(lambda: all(kubelet.probe(pod, host, "engine") for host in hosts.values()))
        release = Release(hosts, front, kubelet, cluster)
        release.set_endpoints(*hosts)
        kubelet.until(front.is_ready)
        release.until_states(e0="ready", e1="ready")
        yield release
        kubelet.stop()


def _check_whole(calls: Sequence[Call], text: str) -> None:
    for call in calls:
        status, _, body = call.end()
        assert (status, is_whole(body)) == (200, True), body[-500:]
        assert text_of(body) == text


@pytest.mark.timeout(240)
def test_a_node_that_will_be_emptied_loses_its_replica_and_no_request(make_bed: MakeBed, tmp_path: Path) -> None:
    with served(make_bed, tmp_path) as release:
        alone = release.front.stream(NUM_TOKENS)
        text = text_of(alone.end()[2])
        _cordon(release, text)
        _terminate(release, text)
        assert release.cluster.asked() == {
            f"/apis/discovery.k8s.io/v1/namespaces/{NAMESPACE}/endpointslices",
            "/api/v1/nodes",
        }, "what the chart's roles allow, and nothing else"


def _streams_at_both(release: Release) -> list[Call]:
    for _ in range(5):
        before = release.num_steps()
        streams = [release.front.stream(NUM_TOKENS) for _ in range(6)]
        release.front.until_streaming(streams)
        after = release.num_steps()
        assert all(after[name] > before[name] for name in before), "each replica has some"
        if any(stream.process.poll() is None for stream in streams):
            return streams
        for stream in streams:  # clients that start slowly: the first had its tokens before the last began
            stream.end()
    raise AssertionError("too few tokens for this machine")


def _cordon(release: Release, text: str) -> None:
    """And uncordon: nothing was ended, so that the replica is there again at once."""
    streams = _streams_at_both(release)
    release.cluster.patch_node("node-a", unschedulable=True)
    release.until_states(e0="draining", e1="ready")
    assert release.front.is_ready()
    more = [release.front.stream(NUM_TOKENS) for _ in range(2)]
    release.kubelet.until(lambda: not release.front.replicas()[FIRST]["num_running"])
    before = release.num_steps()
    release.front.check_answer()
    assert release.num_steps()[FIRST] == before[FIRST], "nothing new goes there"
    _check_whole([*streams, *more], text)

    release.cluster.patch_node("node-a", unschedulable=None)
    release.until_states(e0="ready", e1="ready")


def _terminate(release: Release, text: str) -> None:
    """A spot instance's warning; then the pod ends, while requests run at the other one."""
    streams = _streams_at_both(release)
    release.cluster.patch_node(
        "node-b", taints=[{"key": "aws-node-termination-handler/spot-itn", "effect": "NoSchedule"}]
    )
    release.until_states(e0="ready", e1="draining")
    release.kubelet.until(lambda: not release.front.replicas()[SECOND]["num_running"])
    release.kubelet.end(release.hosts[SECOND])
    release.front.check_answer()
    release.set_endpoints(FIRST)
    release.until_states(e0="ready")
    release.front.check_answer()
    _check_whole(streams, text)
