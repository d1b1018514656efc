"""values.yaml, its schema and README.md say the same."""

from typing import Any

import helm_python
import pytest
import yaml

from tests.chart.readme import README, current_readme, documented_values
from tests.chart.rendering import CHART, PRESETS, Values, chart, merged, preset, render
from tests.chart.schemas import OLDEST, versions

SECTIONS_THAT_SPEAK_FOR_THEMSELVES = {
    *"image model parallel engine kuberay weights tenants secrets tls serviceAccount rbac networkPolicy".split(),
    *"gateway ingress inferencePool autoscaling monitoring tests engine.rdma frontend.service".split(),
    *"tls.clients.certManager tls.internal.certManager".split(),
}


@pytest.mark.parametrize("name", [None, *PRESETS])
def test_helm_lint_finds_nothing(name: str | None) -> None:
    values = {} if name is None else preset(name)
    for version in versions():
        report = helm_python.lint(CHART, values, strict=True, kube_version=f"v{version}.0")
        found = [message["error"] for message in report["messages"]]
        assert (report["errors"], found) == ([], ["icon is recommended"])


def test_every_value_has_a_comment() -> None:
    values = documented_values((CHART / "values.yaml").read_text())
    assert len(values) > 120
    silent = {value.path for value in values if not value.comment}
    assert silent - SECTIONS_THAT_SPEAK_FOR_THEMSELVES == set()
    assert all(value.comment.endswith((".", ":", "…")) for value in values if value.comment)


def test_defaults_are_read_as_they_stand() -> None:
    values = {value.path: value.default for value in documented_values((CHART / "values.yaml").read_text())}
    assert values["gateway.paths"] == "[/v1]" and values["engine.resources.cpu"] == '"8"'
    assert values["engine"] is None and values["engine.nodeSelector"] == "{}"


def test_readme_is_current() -> None:
    assert README.read_text() == current_readme(), "make chart-golden"


def _schema_paths(schema: dict[str, Any], path: str = "") -> set[str]:
    found = set()
    for name, child in schema.get("properties", {}).items():
        full = f"{path}.{name}".removeprefix(".")
        found |= {full} | _schema_paths(child, full)
        if child.get("$ref") == "#/$defs/resources":
            found |= {f"{full}.{key}" for key in ("cpu", "memory", "ephemeralStorage")}
    return found


def test_the_schema_names_exactly_the_values() -> None:
    schema = chart().schema
    assert schema is not None
    documented = {value.path for value in documented_values((CHART / "values.yaml").read_text())}
    assert _schema_paths(schema) - {"global"} == documented


def _open_objects(schema: Any, path: str = "") -> list[str]:
    if isinstance(schema, list):
        return [one for index, child in enumerate(schema) for one in _open_objects(child, f"{path}/{index}")]
    if not isinstance(schema, dict):
        return []
    is_open = "properties" in schema and schema.get("additionalProperties") is not False
    below = [one for key, child in schema.items() for one in _open_objects(child, f"{path}/{key}")]
    return [path] * is_open + below


def test_the_schema_is_closed_with_room_for_global() -> None:
    assert _open_objects(chart().schema) == []
    chart().validate_schema({"global": {"anything": {"at": "all"}}})
    with pytest.raises(helm_python.HelmValuesError, match="engin"):
        chart().validate_schema({"engin": {}})


def test_the_oldest_kubernetes_is_the_charts() -> None:
    assert chart().metadata["kubeVersion"] == f">={OLDEST}.0-0"


def test_image_volumes_need_a_kubernetes_that_has_them(capfd: pytest.CaptureFixture[str]) -> None:
    """lint only tells of what a template refuses."""
    values: Values = {"model": {"path": "x"}, "weights": {"source": "image", "image": "models/x@sha256:" + "1" * 64}}
    helm_python.lint(CHART, values, kube_version="v1.31.0")
    assert "weights.source" not in capfd.readouterr().err
    helm_python.lint(CHART, values, kube_version="v1.30.9")
    assert "weights.source image needs Kubernetes 1.31" in capfd.readouterr().err


@pytest.mark.parametrize("name", PRESETS)
def test_presets_say_only_what_differs(name: str) -> None:
    """A preset may be read beside values.yaml: nothing in it is a value that the chart does not know."""
    given = preset(name)
    assert chart().merge_values(given) == merged(yaml.safe_load((CHART / "values.yaml").read_text()), given)
    assert render(given)
