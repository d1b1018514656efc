"""Every preset × mode and every two options together: valid for the oldest and the newest Kubernetes and for the custom
resources' own schemas, and as a platform team would have it."""

import copy
from typing import Any

import pytest

from cluster.k8s.leaders import PORT_NAME
from tests.chart.option_matrix import FACTORS, combinations, is_legal, values_of
from tests.chart.policies import violations
from tests.chart.rendering import FULLNAME, Document, Values, all_pods, at, merged, of_kind, only, preset, render
from tests.chart.schemas import problems, versions

GIVEN = {"nccl-topology", "keys", "cluster", "a-tls", "front", "eng", "scrape", "tester", "ca", "redis"}
"""Names that the matrix's values say exist already."""
NEWER_FIELDS = {"1.30": {"image"}}
"""Volumes of a kind that the version does not know: `lint` at that version refuses them (test_values)."""


def test_the_matrix_holds_every_legal_pair() -> None:
    assert 25 <= len(combinations()) <= 80
    seen = {(first, second) for case in combinations() for first in case.items() for second in case.items()}
    for first, levels in FACTORS.items():
        for second, others in FACTORS.items():
            for level in levels:
                for other in others:
                    if first != second and is_legal({first: level, second: other}):
                        assert ((first, level), (second, other)) in seen


def _known_to(document: Document, version: str) -> bool:
    newer = NEWER_FIELDS.get(version, set())
    return not any(newer & volume.keys() for pod in all_pods([document]) for volume in pod["spec"]["volumes"])


@pytest.mark.parametrize("part", range(4))
def test_every_render_is_valid(part: int) -> None:
    for case in combinations()[part::4]:
        documents = render(values_of(case))
        found = [
            f"{document['kind']} {document['metadata']['name']} ({version}): {problem}"
            for document in documents
            for version in versions()
            if _known_to(document, version)
            for problem in problems(document, version)
        ]
        assert found == [], case
        assert violations(documents, given=GIVEN) == [], case


def _damaged(path: str, value: object, kind: str = "LeaderWorkerSet") -> list[Document]:
    documents = copy.deepcopy(render(preset("405b-bf16")))
    node: Any = only(documents, kind, "frontend" if kind == "Deployment" else "")
    *keys, last = path.split("/")
    for key in keys:
        node = node[int(key)] if isinstance(node, list) else node[key]
    if value is None:
        del node[last]
    else:
        node[last] = value
    return documents


LEADER = "spec/leaderWorkerTemplate/leaderTemplate/spec"
FRONTEND = "spec/template/spec"


@pytest.mark.parametrize(
    ("kind", "path", "value", "words"),
    [
        ("LeaderWorkerSet", f"{LEADER}/automountServiceAccountToken", True, "token"),
        ("LeaderWorkerSet", f"{LEADER}/containers/0/image", "remuda:latest", "not pinned"),
        ("LeaderWorkerSet", f"{LEADER}/containers/0/securityContext/privileged", True, "security context"),
        ("LeaderWorkerSet", f"{LEADER}/containers/0/resources/limits/memory", None, "resources"),
        ("LeaderWorkerSet", f"{LEADER}/terminationGracePeriodSeconds", 60, "too few"),
        ("LeaderWorkerSet", f"{LEADER}/containers/0/ports/0/name", "other", "port"),
        ("LeaderWorkerSet", "metadata/name", "demo-remuda", "Service takes the name"),
        ("Deployment", f"{FRONTEND}/hostNetwork", True, "hostNetwork"),
        ("Deployment", f"{FRONTEND}/serviceAccountName", "nobody", "nobody makes"),
        ("Deployment", f"{FRONTEND}/containers/0/env/2/name", "POD_NAME", "variables that do not exist"),
    ],
)
def test_the_policies_see(kind: str, path: str, value: object, words: str) -> None:
    assert any(words in text for text in violations(_damaged(path, value, kind), given=set()))


def test_the_policies_see_selectors() -> None:
    documents = copy.deepcopy(render(preset("405b-bf16")))
    only(documents, "Deployment", "frontend")["spec"]["selector"]["matchLabels"]["app.kubernetes.io/component"] = "x"
    assert any("does not select its own pods" in text for text in violations(documents, given=set()))


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("LeaderWorkerSet", "spec/leaderWorkerTemplate/siz", 2),
        ("LeaderWorkerSet", "spec/leaderWorkerTemplate/restartPolicy", "Never"),
        ("LeaderWorkerSet", f"{LEADER}/containers/0/imagePullPolice", "Always"),
        ("Deployment", f"{FRONTEND}/containers/0/livenessProb", {}),
        ("Deployment", "spec/replicas", "two"),
        ("Deployment", "metadata/labels/app.kubernetes.io", "x" * 64),
    ],
)
def test_the_schemas_see(kind: str, path: str, value: object) -> None:
    documents = of_kind(_damaged(path, value, kind), kind)
    for version in versions():
        assert any(problems(document, version) for document in documents)


def test_requests_meet_no_pod_of_a_replica_but_its_leader() -> None:
    """Service, discovery and InferencePool alike: other charts were blamed for routing to workers."""
    pool = {"inferencePool": {"enabled": True, "extensionService": "epp"}, "auth": {"insecure": True}}
    documents = render(merged(preset("405b-bf16"), pool))
    worker = only(documents, "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]["workerTemplate"]
    labels, (container,) = worker["metadata"]["labels"], worker["spec"]["containers"]
    behind = [one for one in of_kind(documents, "Service") if one["spec"]["selector"].items() <= labels.items()]
    # Front ends learn there on which nodes a replica's pods are; nobody is sent to its address, which it has not.
    assert [one["metadata"]["name"] for one in behind] == ["demo-remuda-leaders"]
    assert behind[0]["spec"]["clusterIP"] == "None"
    assert PORT_NAME not in {port["name"] for port in container["ports"]}
    matched = only(documents, "InferencePool")["spec"]["selector"]["matchLabels"]
    assert matched["leaderworkerset.sigs.k8s.io/worker-index"] == "0"


def test_autoscalers_own_the_number_of_replicas() -> None:
    """A number in the render would take back what the autoscaler did, with every upgrade."""
    for mode, kind in (("lws", "LeaderWorkerSet"), ("single", "Deployment")):
        values = merged(preset("cpu-demo"), at("engine.mode", mode))
        assert only(render(values), kind, "engine")["spec"]["replicas"] == 1
        scaled = render(merged(values, at("autoscaling.mode", "hpa")))
        assert "replicas" not in only(scaled, kind, "engine")["spec"]


def test_workers_stay_while_their_leader_drains() -> None:
    documents = render(merged(preset("405b-bf16"), {"engine": {"unreadySeconds": 7, "drainSeconds": 90}}))
    template = only(documents, "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]
    seconds = {
        name: template[name]["spec"]["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
        for name in ("leaderTemplate", "workerTemplate")
    }
    assert seconds == {"leaderTemplate": 7, "workerTemplate": 97}
    assert {template[name]["spec"]["terminationGracePeriodSeconds"] for name in seconds} == {127}


@pytest.mark.parametrize(("mode", "name"), [("lws", "frontend"), ("single", "engine")])
def test_readiness_gates_stand_where_clients_arrive(mode: str, name: str) -> None:
    """A load balancer's controller knows no other pods: these would never become ready."""
    gate = {"conditionType": "target-health.elbv2.k8s.aws/remuda"}
    documents = render(
        merged(preset("cpu-demo"), at("engine.mode", mode), at("frontend.readinessGates", [gate["conditionType"]]))
    )
    gated = only(documents, "Deployment", name)["spec"]["template"]
    assert gated["spec"]["readinessGates"] == [gate]
    assert all("readinessGates" not in pod["spec"] for pod in all_pods(documents) if pod != gated)


@pytest.mark.parametrize(
    ("mode", "field", "leaders", "workers"), [("lws", "maxUnavailable", 2, 4), ("kuberay", "minAvailable", 3, 6)]
)
def test_evictions_take_the_pods_of_few_replicas(mode: str, field: str, leaders: int, workers: int) -> None:
    layout: Values = {
        "parallel": {"pipeline": 3, "tensor": 8},
        "engine": {"hosts": 3, "devicesPerHost": 8},
        "sizing": None,
    }
    values = merged(preset("405b-bf16"), layout, {"engine": {"mode": mode, "replicas": 5, "maxUnavailable": 2}})
    budgets = {one["metadata"]["name"]: one["spec"] for one in of_kind(render(values), "PodDisruptionBudget")}
    assert budgets[f"{FULLNAME}-engine"][field] == leaders and budgets[f"{FULLNAME}-workers"][field] == workers
    roles = {name: budget["selector"]["matchLabels"].get("remuda.io/role") for name, budget in budgets.items()}
    assert roles == {f"{FULLNAME}-engine": "leader", f"{FULLNAME}-workers": "worker", f"{FULLNAME}-frontend": None}
    alone = of_kind(render(preset("405b-fp8")), "PodDisruptionBudget")
    assert f"{FULLNAME}-workers" not in {one["metadata"]["name"] for one in alone}
