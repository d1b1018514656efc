"""Objects as the API server sends them."""

from typing import Any

SLICES = "/apis/discovery.k8s.io/v1/namespaces/llm/endpointslices"
NODES = "/api/v1/nodes"
SERVICE = "llama-leaders"


def endpoint(pod: str, host: str, node: str = "node-a", **conditions: bool) -> dict[str, Any]:
    return {
        "addresses": [host],
        "conditions": {"ready": True, "serving": True, "terminating": False, **conditions},
        "targetRef": {"kind": "Pod", "name": pod, "namespace": "llm"},
        "nodeName": node,
    }


def endpoint_slice(name: str, *endpoints: dict[str, Any], port: int = 9052, service: str = SERVICE) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "namespace": "llm", "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4",
        "ports": [{"name": "health", "port": 8080, "protocol": "TCP"}, {"name": "leader", "port": port}],
        "endpoints": list(endpoints),
    }


def node(name: str, *, unschedulable: bool = False, taints: list[dict[str, str]] | None = None) -> dict[str, Any]:
    spec: dict[str, Any] = {"unschedulable": True} if unschedulable else {}
    return {"metadata": {"name": name}, "spec": {**spec, **({"taints": taints} if taints else {})}}
