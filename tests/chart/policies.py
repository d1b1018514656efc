"""What a platform team checks by hand: of every pod, and of the objects that name each other. Each function returns
sentences, empty where all is well."""

import re
from collections.abc import Iterator

from tests.chart.rendering import Document, all_pods, containers, of_kind, pod_templates

_TOKEN_MOUNTED = {"frontend"}
"""Components whose pods use the Kubernetes API."""
_FROM_OUTSIDE = {"LWS_LEADER_ADDRESS", "FQ_RAY_IP"}
"""Environment variables that LeaderWorkerSet and KubeRay put into pods."""


def violations(documents: list[Document], *, given: set[str]) -> list[str]:
    """``given``: names of secrets, accounts and ConfigMaps that the values say exist already."""
    return [
        *(text for pod in all_pods(documents) for text in _pod(pod)),
        *_names(documents),
        *_services(documents),
        *_selectors(documents),
        *_references(documents, given),
        *_targets(documents),
    ]


def _component(pod: Document) -> str:
    return str(pod["metadata"]["labels"]["app.kubernetes.io/component"])


def _pod(pod: Document) -> Iterator[str]:
    spec, component = pod["spec"], _component(pod)
    if spec.get("automountServiceAccountToken") is not (component in _TOKEN_MOUNTED):
        yield f"{component}: a service account's token is mounted where it is unused, or the other way round"
    for field in ("hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"):
        if field in spec:
            yield f"{component}: {field}"
    context = spec["securityContext"]
    if (
        not context["runAsNonRoot"]
        or context["runAsUser"] == 0
        or context["seccompProfile"]["type"] != "RuntimeDefault"
    ):
        yield f"{component}: security context {context}"
    volumes = {volume["name"] for volume in spec["volumes"]}
    if len(volumes) != len(spec["volumes"]):
        yield f"{component}: a volume's name stands twice"
    for container in containers(pod):
        yield from (f"{component}: {text}" for text in _container(container, volumes))
    used = {mount["name"] for container in containers(pod) for mount in container["volumeMounts"]}
    if volumes - used:
        yield f"{component}: volumes that nobody mounts: {sorted(volumes - used)}"
    grace = spec.get("terminationGracePeriodSeconds", 30)
    for container in spec["containers"]:
        yield from (f"{component}: {text}" for text in _stopping(container, grace))


def _container(container: Document, volumes: set[str]) -> Iterator[str]:
    context = container["securityContext"]
    if context.get("privileged") or context["allowPrivilegeEscalation"] or not context["readOnlyRootFilesystem"]:
        yield f"security context {context}"
    if context["capabilities"]["drop"] != ["ALL"] or set(context["capabilities"].get("add", [])) - {"IPC_LOCK"}:
        yield f"capabilities {context['capabilities']}"
    image = container["image"]
    if not re.search(r"@sha256:[0-9a-f]{64}$|:[^/:]+$", image) or image.endswith(":latest"):
        yield f"image {image} is not pinned"
    limits, requests = container["resources"].get("limits", {}), container["resources"].get("requests", {})
    if not {"cpu", "memory", "ephemeral-storage"} <= set(limits) or limits.keys() != requests.keys():
        yield f"resources {container['resources']}"
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    if len(set(mounts)) != len(mounts):
        yield f"two volumes at one path: {mounts}"
    if missing := {mount["name"] for mount in container["volumeMounts"]} - volumes:
        yield f"mounts of volumes that do not exist: {sorted(missing)}"
    names = [variable["name"] for variable in container.get("env", [])]
    if len(set(names)) != len(names):
        yield f"an environment variable stands twice: {names}"
    used = re.findall(r"\$\((\w+)\)", " ".join(container.get("args", [])))
    if unknown := set(used) - set(names) - _FROM_OUTSIDE:
        yield f"arguments use variables that do not exist: {sorted(unknown)}"
    ports = {port["name"] for port in container.get("ports", [])}
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        if probe in container and container[probe]["httpGet"]["port"] not in ports:
            yield f"{probe} at a port that does not exist"
    if ports and not {"startupProbe", "livenessProbe", "readinessProbe"} <= container.keys():
        yield "listens, and lacks a probe"


def _stopping(container: Document, grace_s: int) -> Iterator[str]:
    """The grace period must hold the sleep before SIGTERM, the draining after it, and some seconds to end."""
    if "lifecycle" not in container:
        return
    sleep_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    drains = [int(arg.partition("=")[2]) for arg in container["args"] if arg.startswith("--drain-timeout=")]
    if container["command"] == ["remuda", "worker"]:
        drains = [0]  # It ends at once: it slept while its leader drained.
    if not drains or grace_s < sleep_s + drains[0] + 10:
        yield f"{grace_s} s are too few for {sleep_s} s before SIGTERM and {drains} s after it"


def _names(documents: list[Document]) -> Iterator[str]:
    seen = set()
    for document in documents:
        key = document["kind"], document["metadata"]["name"]
        if key in seen:
            yield f"{key} stands twice"
        seen.add(key)
        if len(key[1]) > 63:
            yield f"{key} is longer than 63 characters"
    # LeaderWorkerSet's controller makes a headless Service of its own name.
    for document in of_kind(documents, "LeaderWorkerSet"):
        if ("Service", document["metadata"]["name"]) in seen:
            yield "a Service takes the name of the LeaderWorkerSet's own"


def _matches(selector: Document, pod: Document) -> bool:
    labels = pod["metadata"]["labels"] | {"leaderworkerset.sigs.k8s.io/worker-index": "0"}
    return all(labels.get(key) == value for key, value in selector.items())


def _services(documents: list[Document]) -> Iterator[str]:
    for service in of_kind(documents, "Service"):
        pods = [pod for pod in all_pods(documents) if _matches(service["spec"]["selector"], pod)]
        if not pods:
            yield f"Service {service['metadata']['name']} selects nothing"
        names = [{port["name"] for each in containers(pod) for port in each.get("ports", [])} for pod in pods]
        for port in service["spec"]["ports"]:
            # Other pods of a replica are behind the leaders' Service, too, without its port.
            is_there = any if service["metadata"]["name"].endswith("-leaders") and port["name"] == "leader" else all
            if not is_there(port["targetPort"] in of_pod for of_pod in names):
                yield f"Service {service['metadata']['name']}: no port {port['targetPort']} in each of its pods"


def _selectors(documents: list[Document]) -> Iterator[str]:
    for document in documents:
        selector = (
            document["spec"].get("podSelector") or document["spec"].get("selector") if "spec" in document else None
        )
        labels = (selector or {}).get("matchLabels")
        if labels and not any(_matches(labels, pod) for pod in all_pods(documents)):
            yield f"{document['kind']} {document['metadata']['name']} selects nothing"
        if document["kind"] == "Deployment":
            yield from (
                f"Deployment {document['metadata']['name']} does not select its own pods"
                for pod in pod_templates(document)
                if not _matches(labels or {"": ""}, pod)
            )


def _references(documents: list[Document], given: set[str]) -> Iterator[str]:
    existing = {(one["kind"], one["metadata"]["name"]) for one in documents}
    issued = {one["spec"]["secretName"] for one in of_kind(documents, "Certificate")}
    for pod in all_pods(documents):
        wanted = [("ServiceAccount", pod["spec"]["serviceAccountName"])]
        for volume in pod["spec"]["volumes"]:
            if "secret" in volume:
                wanted.append(("Secret", volume["secret"]["secretName"]))
            if "configMap" in volume:
                wanted.append(("ConfigMap", volume["configMap"]["name"]))
        for kind, name in wanted:
            if (kind, name) not in existing and name not in issued | given:
                yield f"{_component(pod)} needs {kind} {name}, which nobody makes"


def _targets(documents: list[Document]) -> Iterator[str]:
    existing = {(one["apiVersion"], one["kind"], one["metadata"]["name"]) for one in documents}
    services = {one["metadata"]["name"]: one["spec"]["ports"] for one in of_kind(documents, "Service")}
    for one in documents:
        kind, spec = one["kind"], one.get("spec", {})
        if kind in ("HorizontalPodAutoscaler", "ScaledObject"):
            target = spec["scaleTargetRef"]
            if (target["apiVersion"], target["kind"], target["name"]) not in existing:
                yield f"{kind} scales {target}, which does not exist"
        if kind in ("HTTPRoute", "GRPCRoute"):
            for backend in (backend for rule in spec["rules"] for backend in rule["backendRefs"]):
                if backend.get("kind") == "InferencePool":
                    if (f"{backend['group']}/v1", "InferencePool", backend["name"]) not in existing:
                        yield f"{kind} goes to {backend}, which does not exist"
                elif backend["port"] not in [port["port"] for port in services.get(backend["name"], [])]:
                    yield f"{kind} goes to {backend}, which does not exist"
