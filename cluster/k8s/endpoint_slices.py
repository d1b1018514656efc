"""What the EndpointSlices of a Service say of the pods behind it. Pure: objects are dicts as the API server sends them.

https://kubernetes.io/docs/reference/kubernetes-api/service-resources/endpoint-slice-v1/
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from engine.errors import InvalidOption

Json = Mapping[str, Any]

PREFIX = "kubernetes:"
_KUBERAY_PREFIX_LENGTH = 50
"""Characters of cluster and group that KubeRay leaves before ``-worker-fghij`` in the name of a pod."""


@dataclass(frozen=True)
class ServiceName:
    """Of the Service whose endpoints are leaders."""

    namespace: str
    name: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """``kubernetes:NAMESPACE/SERVICE``. Raises InvalidOption."""
        namespace, slash, name = text.removeprefix(PREFIX).partition("/")
        if not (text.startswith(PREFIX) and namespace and slash and name) or "/" in name:
            raise InvalidOption(f"--discover {text}: write {PREFIX}NAMESPACE/SERVICE")
        return cls(namespace, name)


@dataclass(frozen=True)
class Endpoint:
    """One pod. ``address``: host:port of the wanted port. ``is_ready``: its probes say so and nothing has told it to
    end."""

    pod: str
    address: str
    is_ready: bool


@dataclass(frozen=True)
class Pod:
    """``node``: empty where the API leaves it out. ``is_terminating``: it got the order to end, and may still finish
    what it has."""

    node: str
    is_terminating: bool


def endpoints(slices: Iterable[Json], port_name: str) -> dict[str, Endpoint]:
    """By pod. A pod may be in two slices while it moves between them: the one that calls it ready wins."""
    found: dict[str, Endpoint] = {}
    for each in slices:
        port = next((port["port"] for port in each.get("ports") or () if port.get("name") == port_name), None)
        if port is None:
            continue
        for entry in each.get("endpoints") or ():
            endpoint = _endpoint(entry, port)
            before = found.get(endpoint.pod)
            if before is None or endpoint.is_ready or not before.is_ready:
                found[endpoint.pod] = endpoint
    return found


def pods(slices: Iterable[Json]) -> dict[str, Pod]:
    """By name, of all pods behind the Service, whatever their ports. Of a pod in two slices, as while it moves or where
    another of its name takes its place, the one that lives wins."""
    found: dict[str, Pod] = {}
    for each in slices:
        for entry in each.get("endpoints") or ():
            name = _pod(entry)
            if name not in found or found[name].is_terminating:
                found[name] = Pod(entry.get("nodeName") or "", _is_terminating(entry))
    return found


def _pod(entry: Json) -> str:
    """Its name, or its address where the API leaves that out."""
    return str((entry.get("targetRef") or {}).get("name") or entry["addresses"][0])


def _endpoint(entry: Json, port: int) -> Endpoint:
    # All addresses of one entry are the same pod's, and the first is the one to use, says the API.
    host = entry["addresses"][0]
    # "ready: nil should be interpreted as true": the API leaves it out where nobody knows.
    is_ready = (entry.get("conditions") or {}).get("ready") is not False and not _is_terminating(entry)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return Endpoint(_pod(entry), address, is_ready)


def _is_terminating(entry: Json) -> bool:
    return bool((entry.get("conditions") or {}).get("terminating"))


class LeaderTable:
    """Which leaders a front end should know, from one look at the endpoints to the next.

    A leader joins when it is ready for the first time, and stays until it is gone: one that is not ready is repaired
    or busy with its last requests, and its streams go on.
    """

    def __init__(self) -> None:
        self._known: dict[str, Endpoint] = {}
        self._pods: Mapping[str, Pod] = {}

    def update(self, found: Mapping[str, Endpoint], pods: Mapping[str, Pod]) -> dict[str, str]:
        """Pod → host:port of every leader to know from now on.

        ``pods``: all of the replicas, leaders and others.
        """
        self._pods = pods
        self._known = {
            pod: endpoint
            for pod, endpoint in found.items()
            if endpoint.is_ready or (pod in self._known and self._known[pod].address == endpoint.address)
        }
        return {pod: endpoint.address for pod, endpoint in self._known.items()}

    def ending(self) -> frozenset[str]:
        """The leaders of the replicas of which a pod got the order to end. Without any one of its pods a replica stands
        still."""
        return self._leaders_of(pod for pod, it in self._pods.items() if it.is_terminating)

    def on_node(self, node: str) -> frozenset[str]:
        """The leaders of the replicas that have a pod there."""
        return self._leaders_of(pod for pod, it in self._pods.items() if it.node == node)

    def _leaders_of(self, pods: Iterable[str]) -> frozenset[str]:
        return frozenset(leader for pod in pods for leader in self._known if is_led_by(pod, leader))


def is_led_by(pod: str, leader: str) -> bool:
    """Whether both pods are of one replica, by the names that LeaderWorkerSet (``X`` leads ``X-1``) and KubeRay
    (``X-head-abcde`` leads ``X-workers-worker-fghij``) give them."""
    group, _, index = pod.rpartition("-")
    cluster, is_head, _ = leader.rpartition("-head")
    # Only workers' names reach the limit: the chart's clusters have at most so many characters themselves.
    prefix = f"{cluster}-workers"[:_KUBERAY_PREFIX_LENGTH]
    return (
        pod == leader
        or (group == leader and index.isdigit())
        or (bool(is_head) and pod.rpartition("-worker-")[0] == prefix)
    )
