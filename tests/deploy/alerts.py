"""deploy/monitoring/alerts.yaml: the chart's alerts for a Prometheus outside Kubernetes, made from them."""

import copy
import re
from pathlib import Path

import yaml

from tests.chart.rendering import Document, at, only, render

DEPLOY = Path(__file__).parents[2] / "deploy"
ALERTS = DEPLOY / "monitoring" / "alerts.yaml"
_HEAD = "# Made from helm/remuda/templates/alerts.yaml (make chart-golden).\n"


def alerts_text() -> str:
    """Of all models of the scraped job: only the label ``namespace`` selects, which prometheus.yaml sets."""
    groups: list[Document] = copy.deepcopy(only(render(at("monitoring.rules", True)), "PrometheusRule"))["spec"][
        "groups"
    ]
    for rule in groups[0]["rules"]:
        rule["expr"] = re.sub(r'namespace="llm",?(model_name="[^"]*",?)?', 'namespace="remuda",', rule["expr"])
        rule["expr"] = rule["expr"].replace(",}", "}").replace(" ,", "")
        summary = rule["annotations"]["summary"].replace(" of remuda-tiny", "").replace(" on remuda-tiny", "")
        rule["annotations"]["summary"] = summary.replace(" to remuda-tiny", "")
    groups[0]["name"] = "remuda"
    return _HEAD + yaml.safe_dump({"groups": groups}, sort_keys=False, width=120)
