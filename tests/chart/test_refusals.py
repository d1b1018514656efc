"""Values that cannot work are refused before anything is installed, with a message that names the key."""

import itertools
from typing import Any

import helm_python
import pytest

from cluster.plan.devices import Machines, cpu
from cluster.plan.helm_values import chart_hosts
from cluster.plan.layout_plan import LayoutPlan
from engine.config import ParallelConfig
from engine.errors import LayoutError
from tests.chart.rendering import NAMESPACE, Values, at, chart, merged, render

# By the schema: path, value, what the message must hold beside the path.
BY_SCHEMA: list[tuple[str, Any, str]] = [
    ("image.tag", "latest", ""),
    ("image.tag", "a b", "does not match"),
    ("image.digest", "sha256:12", "does not match"),
    ("image.pullPolicy", "Sometimes", "IfNotPresent"),
    ("model.dtype", "float16", "bfloat16"),
    ("model.quantization", "int3", "int4"),
    ("model.maxLen", "long", ""),
    ("model.path", "../etc", ""),
    ("model.extraArgs", ["rm -rf"], "does not match"),
    ("nameOverride", "llama.v3", "does not match"),
    ("parallel.tensor", 0, "minimum"),
    ("parallel.pipeline", "2", "want integer"),
    ("engine.mode", "statefulset", "kuberay"),
    ("engine.device", "gpu", "cuda"),
    ("engine.replicas", -1, "minimum"),
    ("engine.gpuMemoryUtilization", 1.5, "maximum"),
    ("engine.kvCacheMemory", "half", "does not match"),
    ("engine.resources.memory", "64GB", "does not match"),
    ("engine.startupMinutes", 0, "minimum"),
    ("engine.drainSeconds", 1e9, ""),
    ("frontend.httpPort", 80, "minimum"),
    ("frontend.service.type", "ExternalName", "LoadBalancer"),
    ("frontend.service.sessionAffinity", "Cookie", "ClientIP"),
    ("frontend.extraEnv", [{"nam": "x"}], ""),
    ("frontend.readinessGates", ["a b"], "does not match"),
    ("weights.source", "s3", "pvc"),
    ("weights.mountPath", "models", "does not match"),
    ("auth.jwt", [{"issuer": "https://issuer.example"}], "audience"),
    ("auth.certificates", [{"name": "edge", "tenant": "a"}], "does not match"),
    ("tenants.limits.default", {"requests_per_second": 1}, "requests_per_second"),
    ("tenants.store", "memcached://a", "does not match"),
    ("tls.clients.certManager.issuerKind", "Vault", "ClusterIssuer"),
    ("networkPolicy.clients", [{"everybody": True}], "everybody"),
    ("ingress.paths", [], "minItems"),
    ("autoscaling.mode", "vpa", "keda"),
    ("autoscaling.scaleDownSeconds", 7200, "maximum"),
    ("monitoring.firstTokenSeconds", 0, ""),
    ("monitoring.otlpEndpoint", "collector:4317", ""),
]

# By the templates, where only several values together are wrong: values, the keys and words of the message.
BY_TEMPLATE: list[tuple[Values, list[str]]] = [
    (at("parallel.tensor", 8), ["parallel.tensor", "engine.hosts × engine.devicesPerHost", "8 ranks", "1 devices"]),
    (at("engine.hosts", 2), ["parallel.pipeline", "engine.hosts", "1 ranks", "2 devices"]),
    (
        merged(at("parallel.tensor", 4), at("parallel.expert", 3), at("engine.devicesPerHost", 4)),
        ["parallel.expert = 3"],
    ),
    (merged(at("parallel.tensor", 4), at("engine.hosts", 2), at("engine.devicesPerHost", 2)), ["parallel.tensor = 4"]),
    (
        {"parallel": {"pipeline": 2}, "engine": {"mode": "single", "hosts": 2}},
        ["engine.mode single", "engine.hosts = 2", "lws"],
    ),
    (
        at("engine.rdma.enabled", True) | {"engine": {"rdma": {"enabled": True}, "device": "cpu"}},
        ["engine.rdma.enabled"],
    ),
    ({"engine": {"mode": "kuberay", "exclusiveTopologyKey": "rack"}}, ["engine.exclusiveTopologyKey", "kuberay"]),
    (at("model.path", "Llama-3.1-8B"), ["model.path = Llama-3.1-8B", "weights.source"]),
    ({"model": {"path": "x"}, "weights": {"source": "pvc"}}, ["weights.existingClaim"]),
    ({"model": {"path": "x"}, "weights": {"source": "image", "image": "models/x:1"}}, ["weights.image", "digest"]),
    (at("tls.clients.enabled", True), ["tls.clients.enabled", "tls.clients.existingSecret"]),
    (at("tls.clients.certManager.enabled", True), ["tls.clients.certManager.enabled"]),
    (at("tls.clients", {"enabled": True, "certManager": {"enabled": True}}), ["tls.clients.certManager.issuerName"]),
    (
        at(
            "tls.clients", {"enabled": True, "existingSecret": "a", "certManager": {"enabled": True, "issuerName": "b"}}
        ),
        ["tls.clients.existingSecret", "exclude"],
    ),
    (at("tls.internal.enabled", True), ["tls.internal.enabled", "tls.internal.existingSecret"]),
    (at("tls.internal", {"enabled": True, "certManager": {"enabled": True}}), ["tls.internal.certManager.issuerName"]),
    ({"engine": {"mode": "single"}, "tls": {"internal": {"enabled": True, "existingSecret": "a"}}}, ["tls.internal"]),
    (at("tls.clients.requireCertificate", True), ["tls.clients.requireCertificate"]),
    ({"auth": {"insecure": True, "existingSecret": "keys"}}, ["auth.insecure", "auth.existingSecret"]),
    (at("tenants.storeSecret", "redis"), ["tenants.storeSecret", "tenants.store"]),
    (at("auth.gateways", [{"name": "dns:edge"}]), ["auth.gateways", "tls.clients.requireCertificate"]),
    ({"auth": {"existingSecret": "keys"}, "monitoring": {"podMonitor": True}}, ["monitoring.tokenSecret"]),
    (at("gateway.enabled", True), ["gateway.parentRefs"]),
    (
        {
            "gateway": {"enabled": True, "parentRefs": [{"name": "edge"}]},
            "tls": {"clients": {"enabled": True, "existingSecret": "tls"}},
        },
        ["gateway.caConfigMap"],
    ),
    (
        {"gateway": {"enabled": True, "parentRefs": [{"name": "g"}], "hostnames": ["a.b"], "grpcHostnames": ["a.b"]}},
        ["gateway.grpcHostnames", "gateway.hostnames", "a.b"],
    ),
    (
        {"model": {"path": "llama"}, "weights": {"source": "disk", "existingClaim": "models"}},
        ["weights.source disk", "engine.nodeSelector"],
    ),
    (at("ingress.enabled", True), ["ingress.host"]),
    (
        {
            "ingress": {"enabled": True, "host": "a.example"},
            "tls": {"clients": {"enabled": True, "existingSecret": "tls"}},
        },
        ["ingress.enabled", "tls.clients.enabled"],
    ),
    (at("inferencePool.enabled", True), ["inferencePool.enabled", "auth.insecure"]),
    ({"inferencePool": {"enabled": True}, "auth": {"insecure": True}}, ["inferencePool.extensionService"]),
    (
        {
            "inferencePool": {"enabled": True, "extensionService": "epp"},
            "auth": {"insecure": True},
            "tls": {"clients": {"enabled": True, "existingSecret": "tls"}},
        },
        ["inferencePool.enabled", "tls.clients.enabled"],
    ),
    (at("autoscaling.mode", "keda"), ["autoscaling.prometheusUrl"]),
    ({"engine": {"mode": "kuberay"}, "autoscaling": {"mode": "hpa"}}, ["autoscaling.mode", "engine.mode"]),
    (at("autoscaling.minReplicas", 3), ["autoscaling.maxReplicas = 2", "autoscaling.minReplicas = 3"]),
    (
        at("model.extraArgs", ["--enable-eplb", "--tp=8", "--dtype=auto"]),
        ["model.extraArgs: --tp, --dtype", "other values"],
    ),
    (at("model.extraArgs", ["--request-timeout=900"]), ["--request-timeout", "engine.mode lws", "frontend.extraArgs"]),
    (at("model.extraArgs", ["--replicas=2"]), ["model.extraArgs: --replicas", "`remuda engine`"]),
    (at("frontend.extraArgs", ["--drain-timeout=5"]), ["frontend.extraArgs: --drain-timeout", "other values"]),
]


@pytest.mark.parametrize(("path", "value", "words"), BY_SCHEMA, ids=[f"{path}={value}" for path, value, _ in BY_SCHEMA])
def test_the_schema_refuses(path: str, value: Any, words: str) -> None:
    with pytest.raises(helm_python.HelmValuesError) as raised:
        render(at(path, value))
    message = str(raised.value)
    assert "/" + path.replace(".", "/") in message and words in message


@pytest.mark.parametrize(("values", "words"), BY_TEMPLATE, ids=[words[0] for _, words in BY_TEMPLATE])
def test_the_templates_refuse(values: Values, words: list[str]) -> None:
    with pytest.raises(helm_python.HelmRenderError) as raised:
        render(values)
    message = str(raised.value)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("release", ["llama.v3", "3-llamas"])
def test_a_release_whose_name_no_service_can_have_is_refused(release: str) -> None:
    with pytest.raises(helm_python.HelmRenderError, match="fullnameOverride"):
        chart().render({}, name=release, namespace=NAMESPACE)
    assert chart().render({"fullnameOverride": "llama"}, name=release, namespace=NAMESPACE)


def _chart_takes(layout: ParallelConfig, hosts: int, per_host: int) -> bool:
    parallel = {"tensor": layout.tp, "pipeline": layout.pp, "data": layout.dp, "expert": layout.ep}
    try:
        render({"parallel": parallel, "engine": {"hosts": hosts, "devicesPerHost": per_host}})
    except helm_python.HelmRenderError:
        return False
    return True


def test_the_chart_refuses_the_degrees_that_plan_refuses() -> None:
    """Over all small layouts and machines: the chart takes a layout exactly where `ParallelConfig` does and
    `remuda plan --format helm` would place it on just these hosts."""
    num_taken = num_refused = 0
    for tp, pp, dp, ep in itertools.product((1, 2, 4), (1, 2, 3), (1, 2), (1, 2, 4)):
        hosts, per_host = (pp, tp * dp) if (tp + ep) % 2 else (dp, tp * pp)
        try:
            layout = ParallelConfig(tp=tp, pp=pp, dp=dp, ep=ep)
        except LayoutError:
            num_refused += 1
            with pytest.raises(helm_python.HelmRenderError, match=r"parallel\.expert"):
                render(
                    {
                        "parallel": {"tensor": tp, "pipeline": pp, "data": dp, "expert": ep},
                        "engine": {"hosts": hosts, "devicesPerHost": per_host},
                    }
                )
            continue
        for machines in (Machines(cpu("any", 1), hosts, per_host), Machines(cpu("any", 1), per_host, hosts)):
            plan = LayoutPlan(machines, layout, (), 1, 1, 1, ())
            try:
                placed = chart_hosts(plan)
            except LayoutError:
                assert not _chart_takes(layout, machines.num_hosts, machines.per_host)
                num_refused += 1
            else:
                assert _chart_takes(layout, *placed)
                num_taken += 1
    assert num_taken > 30 and num_refused > 30
