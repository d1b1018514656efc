"""Which nodes will be emptied soon. Pure: objects are dicts as the API server sends them."""

from collections.abc import Iterable, Mapping
from typing import Any

Json = Mapping[str, Any]

LEAVING_TAINTS = {
    "node.kubernetes.io/unschedulable": "cordoned",
    "node.kubernetes.io/out-of-service": "out of service",
    "cloud.google.com/impending-node-termination": "about to be terminated",
    "aws-node-termination-handler/spot-itn": "a spot instance about to be taken",
    "aws-node-termination-handler/rebalance-recommendation": "a spot instance likely to be taken",
    "aws-node-termination-handler/scheduled-maintenance": "due for maintenance",
    "kubernetes.azure.com/scheduled-event": "due for maintenance",
    "ToBeDeletedByClusterAutoscaler": "removed by the cluster autoscaler",
    "karpenter.sh/disrupted": "removed by Karpenter",
}
"""Taints that announce a node's end, whatever their effect, and what they mean."""


def leaving_nodes(nodes: Iterable[Json]) -> dict[str, str]:
    """Name → why, of every node whose pods should go elsewhere while there is time."""
    return {node["metadata"]["name"]: reason for node in nodes if (reason := _why_leaving(node)) is not None}


def _why_leaving(node: Json) -> str | None:
    spec = node.get("spec") or {}
    if spec.get("unschedulable"):
        return "cordoned"
    for taint in spec.get("taints") or ():
        if taint["key"] in LEAVING_TAINTS:
            return LEAVING_TAINTS[taint["key"]]
        if taint.get("effect") == "NoExecute" and not taint["key"].startswith("node.kubernetes.io/"):
            # Somebody evicts pods from it. Kubernetes' own NoExecute taints tell of a node that is already silent.
            return f"tainted {taint['key']}"
    return None
