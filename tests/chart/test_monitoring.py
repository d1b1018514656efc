"""Alerts, dashboards and scaling queries name only metrics and labels that a front end really shows."""

import json
import re
from collections.abc import Iterator
from typing import Any

import promql_parser
import pytest

from cluster.frontend.calls import Usage
from cluster.frontend.metrics import Metrics
from cluster.tenants.metrics import TenantMetrics
from cluster.tenants.record import UsageRecord
from cluster.types import ReplicaInfo, ReplicaState
from engine.request import FinishReason
from engine.scheduler.expert_stats import ExpertStats
from engine.timeline import Waits
from tests.chart.rendering import CHART, Document, all_pods, at, merged, of_kind, only, preset, render

OF_PROMETHEUS = {"namespace", "pod", "le"}
"""Labels that its operator adds, and the buckets' own."""


def _shown() -> dict[str, set[str]]:
    """Every series that a front end can show → its labels."""
    experts = ExpertStats(1.0, (1, 2), num_moves=1, num_failed_moves=0, num_moved_experts=1)
    info = ReplicaInfo("r0", "m", ReplicaState.READY, "127.0.0.1:1", 1, 2048, 8, 16, 64, experts=experts)
    metrics = Metrics("m", lambda: [info])
    metrics.watch_live(lambda: 1)
    metrics.first_token(1.0)
    metrics.next_tokens(1.0, 1)
    metrics.begun(Waits(1.0, 1.0))
    metrics.decoded(1.0, Waits(1.0, 1.0))
    metrics.ended("completed", 1.0)
    metrics.used(Usage(1, 1, 1), [FinishReason.STOP])
    metrics.http_response("/v1/models", 200)
    tenants = TenantMetrics(metrics.registry)
    tenants.used(UsageRecord(0.0, "r", "t", "k", "m", "completed", 200, 1, 1, 1, 1.0))
    tenants.ended("t", "completed")
    tenants.refused("t")
    found: dict[str, set[str]] = {}
    for name, labels in re.findall(r"^([a-z0-9_:]+)(?:\{(.*)\})? [^ ]+$", metrics.render().decode(), re.MULTILINE):
        found.setdefault(name, set()).update(re.findall(r"(\w+)=", labels))
    return found


def _selectors(expression: Any) -> Iterator[promql_parser.VectorSelector]:
    found: list[Any] = []
    promql_parser.walk(expression, found.append)
    yield from (node for node in found if isinstance(node, promql_parser.VectorSelector))


def _unknown(text: str) -> list[str]:
    """What an expression names that nobody shows. Raises where it is no PromQL."""
    shown = _shown()
    return [problem for selector in _selectors(_parsed(text)) for problem in _unknown_in(selector, shown)]


def _parsed(text: str) -> Any:
    return promql_parser.parse(text.replace("$__rate_interval", "5m"))


def _unknown_in(selector: promql_parser.VectorSelector, shown: dict[str, set[str]]) -> Iterator[str]:
    if selector.name not in shown:
        yield f"no metric {selector.name}"
        return
    for matcher in selector.matchers.matchers:
        if matcher.name not in shown[selector.name] | OF_PROMETHEUS:
            yield f"{selector.name} has no label {matcher.name}"


def _dashboards() -> dict[str, Document]:
    return {path.stem: json.loads(path.read_text()) for path in sorted((CHART / "dashboards").glob("*.json"))}


def _panel_queries() -> list[tuple[str, str]]:
    return [
        (f"{name}: {panel['title']}", target["expr"])
        for name, dashboard in _dashboards().items()
        for panel in dashboard["panels"]
        for target in panel["targets"]
    ]


def _rules() -> list[Document]:
    documents = render(merged(preset("405b-bf16"), at("monitoring.rules", True)))
    rules: list[Document] = only(documents, "PrometheusRule")["spec"]["groups"][0]["rules"]
    return rules


def test_the_check_sees() -> None:
    assert _unknown("rate(remuda_requests_total{outcome='completed'}[5m])") == []
    assert _unknown("remuda_requests{}") == ["no metric remuda_requests"]
    assert _unknown("sum(remuda_steps_total{tenant='a'})") == ["remuda_steps_total has no label tenant"]
    with pytest.raises(ValueError):
        _unknown("sum(remuda_steps_total")


def test_panels_show_what_exists() -> None:
    queries = _panel_queries()
    assert len(queries) > 40
    assert {title: _unknown(text) for title, text in queries if _unknown(text)} == {}


def test_dashboards_are_whole() -> None:
    for dashboard in _dashboards().values():
        panels = dashboard["panels"]
        assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
        places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
        assert len(set(places)) == len(places)
        variables = {variable["name"] for variable in dashboard["templating"]["list"]}
        used = set(re.findall(r"\$\{?(\w+)", json.dumps([panels, dashboard["templating"]])))
        assert used - variables == {"__rate_interval"}
        for panel in panels:
            for target in panel["targets"]:
                legend_labels = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
                grouped = re.findall(r"by \(([^)]*)\)", target["expr"])
                assert legend_labels <= {label.strip() for labels in grouped for label in labels.split(",")}


def test_dashboards_are_installed_as_they_are() -> None:
    maps = {
        next(iter(one["data"])): one
        for one in of_kind(render(at("monitoring.dashboards", True)), "ConfigMap")
        if one["metadata"]["labels"].get("grafana_dashboard") == "1"
    }
    assert {name.removesuffix(".json"): json.loads(one["data"][name]) for name, one in maps.items()} == _dashboards()


def test_alerts_look_at_what_exists() -> None:
    rules = _rules()
    assert len(rules) >= 11 and len({rule["alert"] for rule in rules}) == len(rules)
    assert {rule["alert"]: _unknown(rule["expr"]) for rule in rules if _unknown(rule["expr"])} == {}
    for rule in rules:
        assert rule["labels"]["severity"] in ("critical", "warning") and rule["annotations"]["summary"].endswith(".")
        assert all('namespace="llm"' in str(selector) for selector in _selectors(_parsed(rule["expr"])))


@pytest.mark.parametrize(("mode", "combined"), [("lws", "max"), ("single", "sum")])
def test_scaling_reads_what_exists(mode: str, combined: str) -> None:
    """Front ends each count all replicas; pods of engine.mode single each count themselves."""
    values = merged(preset("cpu-demo"), {"engine": {"mode": mode}, "autoscaling": {"mode": "keda"}})
    keda = render(merged(values, at("autoscaling.prometheusUrl", "http://p:9090")))
    queries = [trigger["metadata"]["query"] for trigger in only(keda, "ScaledObject")["spec"]["triggers"]]
    assert len(queries) == 2 and all(query.startswith(f"{combined}(") for query in queries)
    assert [problem for query in queries for problem in _unknown(query)] == []
    hpa = only(render(merged(values, at("autoscaling.mode", "hpa"))), "HorizontalPodAutoscaler")
    sources = [metric[metric["type"].lower()] for metric in hpa["spec"]["metrics"]]
    assert {source["metric"]["name"] for source in sources} <= set(_shown())


@pytest.mark.parametrize("mode", ["lws", "single"])
@pytest.mark.parametrize("with_pool", [False, True])
def test_every_pod_that_answers_clients_is_scraped(mode: str, with_pool: bool) -> None:
    pool = {"inferencePool": {"enabled": with_pool, "extensionService": "epp"}, "auth": {"insecure": True}}
    values = merged(preset("cpu-demo"), {"engine": {"mode": mode}, "monitoring": {"podMonitor": True}}, pool)
    documents = render(values)
    monitor = only(documents, "PodMonitor")["spec"]
    (component,) = monitor["selector"]["matchExpressions"]
    assert (component["key"], component["operator"]) == ("app.kubernetes.io/component", "In")
    (endpoint,) = monitor["podMetricsEndpoints"]
    serving = set()
    for pod in all_pods(documents):
        labels, containers_of = pod["metadata"]["labels"], pod["spec"]["containers"]
        ports = {port["name"] for container in containers_of for port in container.get("ports", [])}
        if endpoint["port"] in ports:
            serving.add(labels["app.kubernetes.io/component"])
            assert monitor["selector"]["matchLabels"].items() <= labels.items()
    assert serving <= set(component["values"])
    assert serving == ({"engine"} if mode == "single" else {"frontend", "engine"} if with_pool else {"frontend"})
