"""Who reaches what: network policies and routes."""

import pytest

from tests.chart.rendering import Document, Values, at, merged, of_kind, only, preset, render

PEER = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "edge"}}}
SCRAPER = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
ISSUER = {"issuer": "https://i.example", "audience": "llm", "jwks": "https://i.example:8443/k", "tenant_claim": "t"}
ROUTED: Values = {"gateway": {"enabled": True, "parentRefs": [{"name": "g"}], "hostnames": ["a.b"]}}


def policy_of(mode: str, values: Values) -> Document:
    """That of the pods that clients reach."""
    component = "engine" if mode == "single" else "frontend"
    found = of_kind(render(merged(preset("cpu-demo"), at("engine.mode", mode), values)), "NetworkPolicy")
    (policy,) = [one for one in found if one["metadata"]["name"].endswith(component)]
    return policy


def callers(policy: Document, port: int) -> list[object]:
    """Peers of every rule for the port; None stands for everybody."""
    return [
        rule.get("from")
        for rule in policy["spec"]["ingress"]
        if any(each["port"] == port for each in rule.get("ports", []))
    ]


@pytest.mark.parametrize("mode", ["lws", "single"])
def test_only_clients_and_monitoring_reach_the_port_of_completions(mode: str) -> None:
    assert callers(policy_of(mode, {}), 8000) == [None]
    closed = {"networkPolicy": {"clients": [PEER]}}
    (only_clients,) = callers(policy_of(mode, closed), 8000)
    assert isinstance(only_clients, list) and PEER in only_clients
    scraped = merged(closed, {"networkPolicy": {"monitoring": [SCRAPER]}})
    assert callers(policy_of(mode, scraped), 8000) == [only_clients, [SCRAPER]]
    assert callers(policy_of(mode, scraped), 50051) == [only_clients]


@pytest.mark.parametrize("mode", ["lws", "kuberay", "single"])
def test_pods_that_check_tokens_reach_their_issuers(mode: str) -> None:
    keys = {
        "networkPolicy": {"apiServer": [PEER]},
        "auth": {"jwt": [ISSUER, {**ISSUER, "jwks": "https://o.example/k"}]},
    }
    open_ports = [
        each["port"] for rule in policy_of(mode, keys)["spec"]["egress"] if "to" not in rule for each in rule["ports"]
    ]
    assert {443, 8443} <= set(open_ports)


def test_a_route_of_grpc_is_made_for_other_names_and_leads_to_no_administration() -> None:
    assert not of_kind(render(merged(preset("cpu-demo"), ROUTED)), "GRPCRoute")
    documents = render(merged(preset("cpu-demo"), ROUTED, at("gateway.grpcHostnames", ["grpc.a.b"])))
    (rule,) = only(documents, "GRPCRoute")["spec"]["rules"]
    services = {match["method"]["service"] for match in rule["matches"]}
    assert services == {"remuda.v1.Inference", "vllm.grpc.engine.VllmEngine", "grpc.health.v1.Health"}


def test_with_a_pool_the_route_asks_its_picker() -> None:
    pool: Values = {"inferencePool": {"enabled": True, "extensionService": "epp"}, "auth": {"insecure": True}}
    documents = render(merged(preset("cpu-demo"), at("engine.mode", "lws"), ROUTED, pool))
    (backend,) = only(documents, "HTTPRoute")["spec"]["rules"][0]["backendRefs"]
    pool_of = only(documents, "InferencePool")
    assert (backend["kind"], backend["name"]) == ("InferencePool", pool_of["metadata"]["name"])
    assert pool_of["apiVersion"].startswith(f"{backend['group']}/")
