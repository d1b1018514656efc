"""A few whole renders that are kept, so that a change of the chart shows what it changes: one for each engine mode."""

import copy
from pathlib import Path

import yaml

from tests.chart.rendering import Document, Values, merged, preset, render

FOLDER = Path(__file__).with_name("golden")
CASES: dict[str, Values] = {
    "lws": merged(
        preset("405b-bf16"),
        {
            "image": {"repository": "registry.example/remuda", "digest": "sha256:" + "0" * 64},
            "engine": {"replicas": 2, "rdma": {"enabled": True}, "exclusiveTopologyKey": "example.com/rack"},
            "auth": {"existingSecret": "keys"},
            "secrets": {"existingSecret": "cluster"},
            "tls": {
                "clients": {"enabled": True, "certManager": {"enabled": True, "issuerName": "ca"}},
                "internal": {"enabled": True, "existingSecret": "in"},
            },
            "gateway": {
                "enabled": True,
                "parentRefs": [{"name": "edge"}],
                "caConfigMap": "ca",
                "hostnames": ["a.b"],
                "grpcHostnames": ["grpc.a.b"],
            },
            "autoscaling": {"mode": "keda", "prometheusUrl": "http://prometheus:9090"},
            "monitoring": {"podMonitor": True, "rules": True, "tokenSecret": "scrape"},
        },
    ),
    "kuberay": merged(
        preset("405b-bf16"),
        {"engine": {"mode": "kuberay"}, "weights": {"source": "disk"}},
        {"engine": {"nodeSelector": {"nvme": "yes"}}},
    ),
    "single": preset("cpu-demo"),
}


def golden_text(values: Values) -> str:
    """Sorted by kind and name, with made secrets blanked."""
    documents = sorted(copy.deepcopy(render(values)), key=lambda one: (one["kind"], one["metadata"]["name"]))
    for one in documents:
        if one["kind"] == "Secret":
            one["data"] = dict.fromkeys(one["data"], "random")
    return "".join(f"---\n{_dump(one)}" for one in documents)


def _dump(document: Document) -> str:
    return yaml.safe_dump(document, sort_keys=False, width=120)
