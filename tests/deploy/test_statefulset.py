"""The example for clusters without custom resources, by Kubernetes' schemas, and its commands, by their options."""

import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import typer
import yaml

from cluster.cli.main import app
from cluster.identity.config import SecurityConfig
from tests.chart.schemas import problems, versions
from tests.deploy.alerts import DEPLOY

DOCUMENTS: list[dict[str, Any]] = list(yaml.safe_load_all((DEPLOY / "kubernetes" / "statefulset.yaml").read_text()))


def of(kind: str, name: str) -> dict[str, Any]:
    (found,) = [one for one in DOCUMENTS if (one["kind"], one["metadata"]["name"]) == (kind, name)]
    return found


def templates() -> Iterator[dict[str, Any]]:
    yield of("StatefulSet", "llama-engine")["spec"]["template"]
    yield of("Deployment", "llama")["spec"]["template"]


@pytest.mark.parametrize("version", versions())
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda one: f"{one['kind']}-{one['metadata']['name']}")
def test_kubernetes_knows_every_field(document: dict[str, Any], version: str) -> None:
    assert problems(document, version) == []


def commands() -> dict[str, list[str]]:
    """By the command's name: its arguments."""
    found = {}
    for template in templates():
        (container,) = template["spec"]["containers"]
        if container["command"] == ["sh", "-euc"]:
            lines = re.findall(r"exec (remuda .*)", container["args"][0].replace("\\\n", " "))
            for line in lines:
                _, name, *arguments = shlex.split(line)
                found[name] = arguments
        else:
            found[container["command"][1]] = container["args"]
    return found


def test_commands_have_the_options_that_they_are_given() -> None:
    group: Any = typer.main.get_command(app)
    found = commands()
    assert found.keys() == {"engine", "worker", "frontend"}
    for name, arguments in found.items():
        known = {option for parameter in group.commands[name].params for option in parameter.opts}
        assert {each.partition("=")[0] for each in arguments if each.startswith("--")} <= known, name
    # One replica: what its hosts have is what its layout needs, and everybody goes to its head.
    given = {each.partition("=")[0]: each.partition("=")[2] for each in found["engine"]}
    hosts, devices = int(given["--hosts"]), int(given["--devices"])
    assert hosts == of("StatefulSet", "llama-engine")["spec"]["replicas"]
    assert int(given["--tensor-parallel-size"]) * int(given["--pipeline-parallel-size"]) == hosts * devices
    assert f"--head=llama-engine-0.llama-engine:{given['--ray-port']}" in found["worker"]
    assert f"--leaders=llama-engine-0=llama-engine-0.llama-engine:{given['--leader-port']}" in found["frontend"]


def test_selectors_and_volumes_are_those_of_the_pods() -> None:
    for template in templates():
        (container,) = template["spec"]["containers"]
        volumes = {volume["name"] for volume in template["spec"]["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    engine, frontend = (template["metadata"]["labels"] for template in templates())
    assert of("Service", "llama-engine")["spec"]["selector"] == engine
    assert of("Service", "llama")["spec"]["selector"] == frontend
    assert of("NetworkPolicy", "llama-engine")["spec"]["podSelector"]["matchLabels"] == engine


def test_the_security_file_is_one() -> None:
    written = yaml.safe_load(of("ConfigMap", "llama-security")["data"]["security.yaml"])
    assert SecurityConfig.model_validate(written).api_keys is not None
