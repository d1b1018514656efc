"""Starts the containers of rendered pods as processes of a host each: what a kubelet would start, without containers.

Images, users, read-only roots and limits are not part of it, and secrets and ConfigMaps lie elsewhere: in command
lines, variables and files their paths are replaced. Names of pods are found by /etc/hosts instead of DNS. A service
account is mounted where it belongs.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from tests.chart.rendering import NAMESPACE, Document, of_kind, only
from tests.support.hosts.bed import Bed
from tests.support.hosts.host import Host
from tests.support.hosts.namespaces import NETNS_ETC

REMUDA = str(Path(sys.executable).parent / "remuda")
READY_TIMEOUT_S = 120.0
SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
_MOUNT_ACCOUNT = f"""
mount -t tmpfs none "$(readlink -f /var/run)"
mkdir -p {SERVICE_ACCOUNT}
mount --bind "$0" {SERVICE_ACCOUNT}
exec "$@"
"""


class Cluster(Protocol):
    """What pods are told of the API server."""

    host: Host
    port: int

    def account(self) -> dict[str, bytes]:
        """The files of a service account."""
        ...


class Kubelet:
    """``secrets``: what is in those that the chart does not make, by name. ``cluster``: None, where pods need none."""

    def __init__(
        self,
        documents: list[Document],
        bed: Bed,
        directory: Path,
        secrets: Mapping[str, Mapping[str, bytes]] | None = None,
        cluster: Cluster | None = None,
    ) -> None:
        self._documents = documents
        self._bed = bed
        self._directory = directory
        self._secrets = secrets or {}
        self._cluster = cluster
        self._pods: dict[str, str] = {}
        self._running: dict[int, list[subprocess.Popen[str]]] = {}

    def name(self, address: str, *names: str) -> None:
        """Have all hosts find ``address`` by these names, as a headless Service does for its pods."""
        self._pods |= dict.fromkeys(names, address)
        text = "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in self._pods.items())
        for host in self._bed.hosts:
            directory = NETNS_ETC / host.name
            directory.mkdir(parents=True, exist_ok=True)
            # In place: running processes see the file that is there.
            (directory / "hosts").write_text(text)

    def start(
        self, pod: Document, host: Host, container: str, name: str = "pod-0", node: str = "node", **from_operator: str
    ) -> "subprocess.Popen[str]":
        """``from_operator``: the variables that a controller adds."""
        found = _container(pod, container)
        moved = self._mounted(pod, found, host)
        fields = {
            "status.podIP": host.address,
            "metadata.name": name,
            "metadata.namespace": NAMESPACE,
            "spec.nodeName": node,
            "metadata.labels['topology.kubernetes.io/region']": "region-1",
            "metadata.labels['topology.kubernetes.io/zone']": "",  # as where the node has none
        }
        variables = {one["name"]: _value(one, fields) for one in found["env"]} | from_operator
        arguments = [_expanded(one, variables) for one in (*found["command"][1:], *found["args"])]
        command = [REMUDA, *(_moved(one, moved) for one in arguments)]
        environment = os.environ | {key: _moved(value, moved) for key, value in variables.items()}
        if self._cluster is not None and pod["spec"].get("automountServiceAccountToken"):
            command = [*self._with_account(self._cluster, host), *command]
            environment |= {
                "KUBERNETES_SERVICE_HOST": self._cluster.host.address,
                "KUBERNETES_SERVICE_PORT": str(self._cluster.port),
            }
        with (self._directory / f"{host.address}-{container}.log").open("a") as log:
            process = host.popen(command, env=environment, stdout=log.fileno(), stderr=log.fileno())
        self._running.setdefault(host.number, []).append(process)
        return process

    def _with_account(self, cluster: Cluster, host: Host) -> list[str]:
        """A prefix: in this process's mount namespace the service account is where pods find it."""
        account = self._directory / host.address / "account"
        account.mkdir(parents=True, exist_ok=True)
        for name, content in cluster.account().items():
            (account / name).write_bytes(content)
        return ["sh", "-ec", _MOUNT_ACCOUNT, str(account)]

    def _mounted(self, pod: Document, container: Document, host: Host) -> dict[str, str]:
        """Path in the container → path here, with what secrets and ConfigMaps hold."""
        moved = {}
        for mount in container["volumeMounts"]:
            (volume,) = [one for one in pod["spec"]["volumes"] if one["name"] == mount["name"]]
            path = mount["mountPath"]
            if path in ("/tmp", "/dev/shm"):
                continue
            here = self._directory / host.address / path.lstrip("/")
            here.mkdir(parents=True, exist_ok=True)
            moved[path] = str(here)
            for name, content in self._content(volume).items():
                (here / name).write_bytes(content.replace(b"/etc/remuda", str(here.parent).encode()))
                (here / name).chmod(0o440)
        return moved

    def _content(self, volume: Document) -> dict[str, bytes]:
        if "secret" in volume:
            return self._secret(volume["secret"]["secretName"])
        if "configMap" in volume:
            name = volume["configMap"]["name"]
            (found,) = [one for one in of_kind(self._documents, "ConfigMap") if one["metadata"]["name"] == name]
            return {key: text.encode() for key, text in found["data"].items()}
        return {}

    def _secret(self, name: str) -> dict[str, bytes]:
        if name in self._secrets:
            return dict(self._secrets[name])
        (made,) = [one for one in of_kind(self._documents, "Secret") if one["metadata"]["name"] == name]
        return {key: f"a-secret-called-{key}".encode() for key in made["data"]}

    def probe(self, pod: Document, host: Host, container: str) -> bool:
        """Whether the readiness probe would succeed."""
        found = _container(pod, container)
        asked = found["readinessProbe"]["httpGet"]
        (port,) = [one["containerPort"] for one in found["ports"] if one["name"] == asked["port"]]
        command = ["curl", "--silent", "--output", "/dev/null", "--write-out", "%{http_code}"]
        return host.run([*command, f"http://{host.address}:{port}{asked['path']}"]).stdout == "200"

    def until(self, is_true: Callable[[], bool], timeout_s: float = READY_TIMEOUT_S) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not is_true():
            assert time.monotonic() < deadline_s, self.logs()
            time.sleep(0.3)

    def run_test_pod(self, host: Host, address: str) -> None:
        """`helm test`, to an address instead of the Service's name."""
        pod = only(self._documents, "Pod", "test")
        (container,) = pod["spec"]["containers"]
        moved = self._mounted(pod, container, host)
        command = [*container["command"][1:], *container["args"]]
        command = [re.sub(r"--target=.*:", f"--target={address}:", _moved(one, moved)) for one in command]
        done = host.run([REMUDA, *command], timeout_s=60)
        assert done.returncode == 0 and "[4 tokens" in done.stderr, f"{done.stdout}{done.stderr}\n{self.logs()}"

    def kill(self, host: Host) -> None:
        """As a node's loss does: all processes of its pod at once."""
        for pid in host.pids():
            os.kill(pid, signal.SIGKILL)
        for process in self._running.pop(host.number):
            process.wait(10)

    def end(self, *hosts: Host) -> None:
        """As pods are ended: SIGTERM to their containers, which have to end well in time."""
        ended = [process for host in hosts for process in self._running.pop(host.number)]
        for process in ended:
            process.terminate()
        for process in ended:
            assert process.wait(60) == 0, self.logs()

    def stop(self) -> None:
        self.end(*(host for host in self._bed.hosts if host.number in self._running))

    def logs(self) -> str:
        return "\n".join(f"== {log.name}\n{log.read_text()}" for log in sorted(self._directory.glob("*.log")))


def _container(pod: Document, name: str) -> Document:
    (found,) = [one for one in pod["spec"]["containers"] if one["name"] == name]
    container: Document = found
    return container


def _value(variable: Document, fields: Mapping[str, str]) -> str:
    return str(variable["value"]) if "value" in variable else fields[variable["valueFrom"]["fieldRef"]["fieldPath"]]


def _expanded(argument: str, variables: Mapping[str, str]) -> str:
    return re.sub(r"\$\((\w+)\)", lambda match: variables[match[1]], argument)


def _moved(text: str, paths: Mapping[str, str]) -> str:
    for path, here in paths.items():
        text = text.replace(path, here)
    return text
