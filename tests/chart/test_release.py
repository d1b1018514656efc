"""install → upgrade → rollback → test → uninstall by Helm itself against a mock API server (see api_server.py for what
that does not check: validation, defaults, admission, RBAC, CEL, controllers)."""

import base64
from collections.abc import Iterator
from contextlib import contextmanager

import helm_python
import pytest
import yaml

from tests.chart.api_server import RunningServer, running_server
from tests.chart.rendering import (
    CHART,
    FULLNAME,
    NAMESPACE,
    RELEASE,
    Document,
    Values,
    at,
    merged,
    only,
    preset,
    render,
)

VALUES = merged(
    preset("405b-bf16"),
    {
        "rbac": {"watchNodes": True},
        "ingress": {"enabled": True, "host": "llm.example"},
        "autoscaling": {"mode": "hpa"},
        "monitoring": {"podMonitor": True, "rules": True, "dashboards": True},
    },
)
KEPT = {("Secret", f"{FULLNAME}-cluster"), ("Secret", f"{FULLNAME}-keys")}


@contextmanager
def _helm(server: RunningServer) -> Iterator[helm_python.Config]:
    """Releases are kept in memory: in the cluster they would be protobuf, which the mock cannot read."""
    kubeconfig = server.kubeconfig(NAMESPACE)
    with helm_python.Config(
        kubeconfig_content=kubeconfig, namespace=NAMESPACE, storage_driver="memory", qps=1000.0, burst_limit=1000
    ) as config:
        yield config


def _install(helm: helm_python.Config, values: Values) -> Document:
    return helm.install(CHART, RELEASE, values, namespace=NAMESPACE, timeout=30)


def _upgrade(helm: helm_python.Config, values: Values) -> Document:
    return helm.upgrade(CHART, RELEASE, values, namespace=NAMESPACE, timeout=30)


def _names(documents: list[Document]) -> set[tuple[str, str]]:
    """Without what only `helm test` makes."""
    return {(one["kind"], one["metadata"]["name"]) for one in documents if one["kind"] != "Pod"}


def _secrets(server: RunningServer) -> dict[str, Document]:
    return {name: dict(one["data"]) for (kind, name), one in server.api.existing().items() if kind == "Secret"}


def test_the_life_of_a_release() -> None:
    with running_server(render(VALUES)) as server, _helm(server) as helm:
        assert _install(helm, VALUES)["status"] == "deployed"
        installed = server.api.existing()
        assert installed.keys() == _names(render(VALUES))
        assert all(one["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "Helm" for one in installed.values())
        secrets = _secrets(server)
        assert all(len(base64.b64decode(value)) >= 48 for one in secrets.values() for value in one.values())

        changed = merged(VALUES, {"frontend": {"replicas": 5}, "ingress": {"enabled": False}})
        assert _upgrade(helm, changed)["revision"] == 2
        upgraded = server.api.existing()
        assert installed.keys() - upgraded.keys() == {("Ingress", FULLNAME)} and upgraded.keys() <= installed.keys()
        assert upgraded["Deployment", f"{FULLNAME}-frontend"]["spec"]["replicas"] == 5
        assert _secrets(server) == secrets, "an upgrade must keep the secrets: running pods know the old ones"

        helm.rollback(RELEASE, timeout=30)
        assert [one["revision"] for one in helm.history(RELEASE)] == [1, 2, 3]
        assert server.api.existing().keys() == installed.keys()
        assert server.api.existing()["Deployment", f"{FULLNAME}-frontend"]["spec"]["replicas"] == 2
        assert _secrets(server) == secrets

        assert ("Pod", f"{FULLNAME}-test") not in server.api.existing()
        helm.test(RELEASE, timeout=30)
        path = f"/api/v1/namespaces/{NAMESPACE}/pods/{FULLNAME}-test"
        assert [method for method, asked in server.api.seen if asked == path][-2:] == ["PATCH", "DELETE"]

        helm.uninstall(RELEASE, timeout=30)
        assert server.api.existing().keys() == KEPT

        assert _install(helm, VALUES)["status"] == "deployed"
        assert _secrets(server) == secrets, "a release of the same name takes its secrets up again"


def test_a_refused_upgrade_changes_nothing() -> None:
    values = preset("cpu-demo")
    with running_server(render(values)) as server, _helm(server) as helm:
        _install(helm, values)
        before, num_seen = server.api.existing(), len(server.api.seen)
        for wrong in (at("parallel.tensor", 4), at("engine.mode", "pods"), at("image.tag", "latest")):
            with pytest.raises(helm_python.HelmError):
                _upgrade(helm, merged(values, wrong))
        assert server.api.existing() == before
        assert {method for method, _ in server.api.seen[num_seen:]} <= {"GET"}


def test_an_old_cluster_is_refused() -> None:
    values = preset("cpu-demo")
    with running_server(render(values), "v1.29.4") as server, _helm(server) as helm:
        with pytest.raises(helm_python.HelmError, match=r"1\.30\.0-0.*v1\.29\.4"):
            _install(helm, values)
        assert server.api.existing() == {}


def test_upgrades_move_between_modes() -> None:
    """From single pods to groups: what the old mode had goes, what both have stays."""
    before, after = preset("cpu-demo"), merged(preset("cpu-demo"), at("engine.mode", "lws"))
    with running_server([*render(before), *render(after)]) as server, _helm(server) as helm:
        _install(helm, before)
        _upgrade(helm, after)
        assert server.api.existing().keys() == _names(render(after))


@pytest.mark.parametrize(("mode", "kind"), [("lws", "LeaderWorkerSet"), ("single", "Deployment")])
def test_autoscaling_begins_with_the_replicas_that_run(mode: str, kind: str) -> None:
    """Left out, their number would be the API's default, 1; and it stays what the autoscaler made of it."""
    values = merged(preset("cpu-demo"), {"engine": {"mode": mode, "replicas": 3}})
    scaled = merged(values, {"autoscaling": {"mode": "hpa", "maxReplicas": 6}})
    with running_server(render(scaled)) as server, _helm(server) as helm:
        assert _replicas(_install(helm, values), kind) == 3
        assert _replicas(_upgrade(helm, scaled), kind) == 3
        server.api.existing()[kind, f"{FULLNAME}-engine"]["spec"]["replicas"] = 5
        assert _replicas(_upgrade(helm, merged(scaled, at("frontend.replicas", 4))), kind) == 5
        server.api.existing()[kind, f"{FULLNAME}-engine"]["spec"]["replicas"] = 0
        assert _replicas(_upgrade(helm, scaled), kind) == 0


def _replicas(release: Document, kind: str) -> int:
    """As Helm sent it, and not as the mock merged it."""
    sent = [one for one in yaml.safe_load_all(release["manifest"]) if one]
    return int(only(sent, kind, "engine")["spec"]["replicas"])
