"""A front end's leaders in Kubernetes: who is behind a Service, and whose node is about to go."""

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Any

from kubernetes import client, config

from cluster.k8s.endpoint_slices import PREFIX, LeaderTable, ServiceName, endpoints, pods
from cluster.k8s.nodes import leaving_nodes
from cluster.k8s.object_watch import Objects, ObjectWatch
from engine.errors import InvalidOption

_log = logging.getLogger(__name__)

PORT_NAME = "leader"
SERVICE_LABEL = "kubernetes.io/service-name"


class KubernetesLeaders:
    """Tells the event loop of every change, by calls into it from the watches' threads.

    Args:
        service: whose endpoints to follow, at their port named ``leader``.
        on_leaders: called with pod → host:port of all leaders.
        on_leaving: called with the leaders that are about to end, and why.
        watches_nodes: whether those are leaving, too, whose replica has a pod on a node that will be emptied.
        api: for tests; None reads the pod's own service account, or else the user's kubeconfig.

    Raises:
        InvalidOption: there is neither.
    """

    def __init__(
        self,
        service: ServiceName,
        on_leaders: Callable[[dict[str, str]], None],
        on_leaving: Callable[[dict[str, str]], None],
        watches_nodes: bool,
        api: Any = None,
    ) -> None:
        self._on_leaders = on_leaders
        self._on_leaving = on_leaving
        self._loop = asyncio.get_running_loop()
        self._table = LeaderTable()
        self._leaving: dict[str, str] = {}
        api = api or _api_client()
        self._watches = [
            ObjectWatch(
                f"endpoints of {service.namespace}/{service.name}",
                client.DiscoveryV1Api(api).list_namespaced_endpoint_slice,
                self._into_loop(self._take_slices),
                namespace=service.namespace,
                label_selector=f"{SERVICE_LABEL}={service.name}",
            )
        ]
        if watches_nodes:
            nodes = client.CoreV1Api(api).list_node
            self._watches.append(ObjectWatch("nodes", nodes, self._into_loop(self._take_nodes)))

    def start(self) -> None:
        for each in self._watches:
            each.start()

    def stop(self) -> None:
        for each in self._watches:
            each.stop()

    def _into_loop(self, take: Callable[[Objects], None]) -> Callable[[Objects], None]:
        def hand_over(objects: Objects) -> None:
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(take, objects)

        return hand_over

    def _take_slices(self, slices: Objects) -> None:
        self._on_leaders(self._table.update(endpoints(slices, PORT_NAME), pods(slices)))
        self._tell_leaving()

    def _take_nodes(self, nodes: Iterable[dict[str, Any]]) -> None:
        leaving = leaving_nodes(nodes)
        for name in leaving.keys() - self._leaving.keys():
            _log.warning("node %s is %s: its replicas should end", name, leaving[name])
        self._leaving = leaving
        self._tell_leaving()

    def _tell_leaving(self) -> None:
        leaving = {leader: why for node, why in self._leaving.items() for leader in self._table.on_node(node)}
        self._on_leaving(leaving | dict.fromkeys(self._table.ending(), "about to end"))


def _api_client() -> Any:
    try:
        try:
            config.load_incluster_config()
        except config.ConfigException:
            config.load_kube_config()
    except (config.ConfigException, OSError) as error:
        raise InvalidOption(
            f"--discover {PREFIX}…: neither a pod's service account nor a kubeconfig is here ({error}); use --leaders "
            "outside Kubernetes"
        ) from error
    return client.ApiClient()
