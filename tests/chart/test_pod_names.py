"""Front ends tell by their names which pods are one replica, however long the chart makes these names."""

import pytest

from cluster.k8s.endpoint_slices import is_led_by
from tests.chart.rendering import Document, merged, of_kind, preset, render


def _kuberay_names(cluster: Document) -> tuple[str, list[str]]:
    """Of the head pod and of a worker of each group, as KubeRay's PodName makes them: at most 50 characters of the
    cluster, or of cluster and group, then the kind of node and five characters of the API server's."""
    name = cluster["metadata"]["name"]
    groups = [f"{name}-{group['groupName']}" for group in cluster["spec"]["workerGroupSpecs"]]
    return f"{name[:50]}-head-x7k2p", [f"{group[:50]}-worker-q9z4d" for group in groups]


@pytest.mark.parametrize("length", [12, 33, 34, 39, 40])
def test_workers_of_a_raycluster_belong_to_its_head_and_to_no_other(length: int) -> None:
    values = merged(
        preset("405b-bf16"), {"fullnameOverride": "l" * length, "engine": {"mode": "kuberay", "replicas": 12}}
    )
    names = [_kuberay_names(cluster) for cluster in of_kind(render(values), "RayCluster")]
    assert len(names) == 12 and all(len(workers) == 1 for _, workers in names)
    for head, workers in names:
        assert len(workers[0]) <= 63
        assert [other for other, _ in names if is_led_by(workers[0], other)] == [head]
