"""The rendered pods' own command lines, environments and mounted files, acted out in network namespaces
(tests/support/kubelet.py): a group of two whose leader pod has a front end beside it, and a single pod."""

from pathlib import Path

import pytest

from tests.chart.rendering import Values, merged, only, preset, render
from tests.support.hosts.fixture import MakeBed
from tests.support.kubelet import Kubelet

pytestmark = [pytest.mark.netns, pytest.mark.full]

POOL: Values = {"inferencePool": {"enabled": True, "extensionService": "epp"}, "auth": {"insecure": True}}
GROUP = merged(
    preset("cpu-demo"),
    POOL,
    {
        "parallel": {"pipeline": 2},
        "engine": {"mode": "lws", "hosts": 2, "kvCacheMemory": "64MiB", "drainSeconds": 20},
        "sizing": None,
    },
)
SINGLE = merged(preset("cpu-demo"), {"engine": {"kvCacheMemory": "64MiB", "drainSeconds": 20}})


@pytest.mark.timeout(290)
def test_a_group_of_the_chart_becomes_ready_and_serves(make_bed: MakeBed, tmp_path: Path) -> None:
    documents = render(GROUP)
    template = only(documents, "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]
    leader, worker = template["leaderTemplate"], template["workerTemplate"]
    bed = make_bed(template["size"])
    head, other = bed.hosts
    kubelet = Kubelet(documents, bed, tmp_path)
    kubelet.start(leader, head, "engine")
    kubelet.start(leader, head, "frontend")
    kubelet.start(worker, other, "engine", LWS_LEADER_ADDRESS=head.address)
    kubelet.until(lambda: kubelet.probe(worker, other, "engine"))
    kubelet.until(lambda: all(kubelet.probe(leader, head, name) for name in ("engine", "frontend")))
    kubelet.run_test_pod(other, head.address)
    kubelet.stop()


@pytest.mark.timeout(200)
def test_a_single_pod_of_the_chart_becomes_ready_and_serves(make_bed: MakeBed, tmp_path: Path) -> None:
    documents = render(SINGLE)
    pod = only(documents, "Deployment")["spec"]["template"]
    bed = make_bed(1)
    kubelet = Kubelet(documents, bed, tmp_path)
    kubelet.start(pod, bed.hosts[0], "engine")
    kubelet.until(lambda: kubelet.probe(pod, bed.hosts[0], "engine"))
    kubelet.run_test_pod(bed.hosts[0], bed.hosts[0].address)
    kubelet.stop()
