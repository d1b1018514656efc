"""The rendered pods' own command lines, environments and mounted files, acted out in network namespaces: what a kubelet
would start, without containers. Images, users, read-only roots, DNS and volumes are not part of it."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chart.rendering import Document, Values, merged, of_kind, only, preset, render
from tests.support.hosts.bed import Bed
from tests.support.hosts.fixture import MakeBed
from tests.support.hosts.host import Host

pytestmark = [pytest.mark.netns, pytest.mark.full]

REMUDA = str(Path(sys.executable).parent / "remuda")
READY_TIMEOUT_S = 120.0
POOL: Values = {"inferencePool": {"enabled": True, "extensionService": "epp"}, "auth": {"insecure": True}}
GROUP = merged(
    preset("cpu-demo"),
    POOL,
    {"parallel": {"pipeline": 2}, "engine": {"mode": "lws", "hosts": 2, "kvCacheMemory": "64MiB", "drainSeconds": 20}},
)
SINGLE = merged(preset("cpu-demo"), {"engine": {"kvCacheMemory": "64MiB", "drainSeconds": 20}})


class Kubelet:
    """Starts the containers of rendered pods as processes of a host each."""

    def __init__(self, documents: list[Document], bed: Bed, directory: Path) -> None:
        self._documents = documents
        self._bed = bed
        self._directory = directory
        self.running: list[subprocess.Popen[str]] = []

    def start(self, pod: Document, host: Host, container: str, **from_operator: str) -> "subprocess.Popen[str]":
        (found,) = [one for one in pod["spec"]["containers"] if one["name"] == container]
        moved = self._mounted(pod, found, host)
        variables = {one["name"]: self._value(one, host) for one in found["env"]} | from_operator
        arguments = [self._expanded(one, variables) for one in (*found["command"][1:], *found["args"])]
        environment = os.environ | {name: _moved(value, moved) for name, value in variables.items()}
        log = (self._directory / f"{host.address}-{container}.log").open("a")
        with log:
            process = host.popen(
                [REMUDA, *(_moved(one, moved) for one in arguments)],
                env=environment,
                stdout=log.fileno(),
                stderr=log.fileno(),
            )
        self.running.append(process)
        return process

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
                (here / name).write_text(_moved(content, {"/etc/remuda": str(here.parent)}))
                (here / name).chmod(0o440)
        return moved

    def _content(self, volume: Document) -> dict[str, str]:
        if "secret" in volume:
            (secret,) = [
                one
                for one in of_kind(self._documents, "Secret")
                if one["metadata"]["name"] == volume["secret"]["secretName"]
            ]
            return {name: f"a secret called {name}".replace(" ", "-") for name in secret["data"]}
        if "configMap" in volume:
            name = volume["configMap"]["name"]
            (found,) = [one for one in of_kind(self._documents, "ConfigMap") if one["metadata"]["name"] == name]
            content: dict[str, str] = found["data"]
            return content
        return {}

    def _value(self, variable: Document, host: Host) -> str:
        if "value" in variable:
            return str(variable["value"])
        fields = {"status.podIP": host.address, "metadata.name": "pod-0", "spec.nodeName": "node"}
        return fields[variable["valueFrom"]["fieldRef"]["fieldPath"]]

    def _expanded(self, argument: str, variables: dict[str, str]) -> str:
        return re.sub(r"\$\((\w+)\)", lambda match: variables[match[1]], argument)

    def probe(self, pod: Document, host: Host, container: str) -> bool:
        """Whether the readiness probe would succeed."""
        (found,) = [one for one in pod["spec"]["containers"] if one["name"] == container]
        asked = found["readinessProbe"]["httpGet"]
        (port,) = [one["containerPort"] for one in found["ports"] if one["name"] == asked["port"]]
        command = ["curl", "--silent", "--output", "/dev/null", "--write-out", "%{http_code}"]
        return host.run([*command, f"http://{host.address}:{port}{asked['path']}"]).stdout == "200"

    def until(self, is_true: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        while not is_true():
            assert time.monotonic() < deadline_s, self.logs()
            time.sleep(0.5)

    def run_test_pod(self, host: Host, address: str) -> None:
        """`helm test`, to an address instead of the Service's name."""
        pod = only(self._documents, "Pod", "test")
        (container,) = pod["spec"]["containers"]
        moved = self._mounted(pod, container, host)
        command = [*container["command"][1:], *container["args"]]
        command = [re.sub(r"--target=.*:", f"--target={address}:", _moved(one, moved)) for one in command]
        done = host.run([REMUDA, *command], timeout_s=60)
        assert done.returncode == 0 and "[4 tokens" in done.stderr, f"{done.stdout}{done.stderr}\n{self.logs()}"

    def stop(self) -> None:
        for process in self.running:
            process.terminate()
        for process in self.running:
            assert process.wait(60) == 0, self.logs()

    def logs(self) -> str:
        return "\n".join(f"== {log.name}\n{log.read_text()}" for log in sorted(self._directory.glob("*.log")))


def _moved(text: str, paths: dict[str, str]) -> str:
    for path, here in paths.items():
        text = text.replace(path, here)
    return text


@pytest.mark.timeout(290)
def test_a_group_of_the_chart_becomes_ready_and_serves(make_bed: MakeBed, tmp_path: Path) -> None:
    documents = render(GROUP)
    template = only(documents, "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]
    leader, worker = template["leaderTemplate"], template["workerTemplate"]
    bed = make_bed(template["size"])
    head, other = bed.hosts
    kubelet = Kubelet(documents, bed, tmp_path)
    kubelet.start(leader, head, "engine")
    kubelet.start(leader, head, "frontend")
    kubelet.start(worker, other, "engine", LWS_LEADER_ADDRESS=head.address)
    kubelet.until(lambda: kubelet.probe(worker, other, "engine"))
    kubelet.until(lambda: all(kubelet.probe(leader, head, name) for name in ("engine", "frontend")))
    kubelet.run_test_pod(other, head.address)
    kubelet.stop()


@pytest.mark.timeout(200)
def test_a_single_pod_of_the_chart_becomes_ready_and_serves(make_bed: MakeBed, tmp_path: Path) -> None:
    documents = render(SINGLE)
    pod = only(documents, "Deployment")["spec"]["template"]
    bed = make_bed(1)
    kubelet = Kubelet(documents, bed, tmp_path)
    kubelet.start(pod, bed.hosts[0], "engine")
    kubelet.until(lambda: kubelet.probe(pod, bed.hosts[0], "engine"))
    kubelet.run_test_pod(bed.hosts[0], bed.hosts[0].address)
    kubelet.stop()
