"""The chart's command lines against the commands themselves, and the files that they read."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python
import pytest
import typer
import yaml

from cluster.cli.engine import LEADER_PORT
from cluster.cli.main import app
from cluster.config import load_serve_config
from cluster.identity.cluster_tls import CLUSTER_NAME
from cluster.identity.config import load_security
from cluster.k8s.leaders import PORT_NAME
from cluster.telemetry.config import otlp_endpoint
from cluster.tenants.config import parse_policies
from tests.chart.option_matrix import combinations, values_of
from tests.chart.rendering import (
    NAMESPACE,
    Document,
    Values,
    all_pods,
    at,
    containers,
    merged,
    of_kind,
    only,
    preset,
    render,
    render_text,
)

FIRST_OUTGOING_PORT = 32_768
"""Linux' default (net.ipv4.ip_local_port_range), in pods too."""


def _commands(documents: list[Document]) -> Iterator[tuple[str, list[str]]]:
    """("remuda serve", its arguments) of every container that runs remuda."""
    for pod in all_pods(documents):
        for container in containers(pod):
            if container["command"][0] == "remuda":
                yield " ".join(container["command"][:2]), [*container["command"][2:], *container["args"]]


def _built() -> dict[str, set[str]]:
    """Command → its options."""
    group: Any = typer.main.get_command(app)
    return {
        f"remuda {name}": {
            option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)
        }
        for name, command in group.commands.items()
    }


def test_every_option_is_one_of_the_command() -> None:
    built = _built()
    seen: dict[str, set[str]] = {}
    for case in combinations():
        for command, options in _options_of(render(values_of(case))).items():
            seen.setdefault(command, set()).update(options)
    assert seen.keys() == {f"remuda {name}" for name in "serve frontend generate engine worker".split()}
    assert {command: options - built[command] for command, options in seen.items() if options - built[command]} == {}


def _options_of(documents: list[Document]) -> dict[str, set[str]]:
    """Command → the options that it is given."""
    found: dict[str, set[str]] = {}
    for command, arguments in _commands(documents):
        options = {argument.partition("=")[0] for argument in arguments if argument.startswith("--")}
        found.setdefault(command, set()).update(options)
    return found


def test_numbers_stand_as_they_were_written_in_a_file() -> None:
    """Helm reads them as floats, and of a million on would print 1e+06, which no command takes."""
    text = """
    model: {path: llama, maxLen: 1048576}
    weights: {source: pvc, existingClaim: models}
    tenants: {limits: {default: {tokens_per_minute: 2000000}}}
    autoscaling: {mode: keda, prometheusUrl: "http://p:9090", waitingPerReplica: 3000000, runningPerReplica: 4000000}
    monitoring: {rules: true}
    """
    texts = render_text(helm_python.values_from_yaml(text))
    assert not [path for path, content in texts.items() if re.search(r"[0-9]e\+[0-9]", content)]
    documents = render(helm_python.values_from_yaml(text))
    (arguments,) = [found for command, found in _commands(documents) if command == "remuda engine"]
    assert "--max-model-len=1048576" in arguments
    limits = parse_policies(only(documents, "ConfigMap", "security")["data"]["tenants.yaml"], "values")
    assert limits.default.tokens_per_minute == 2_000_000
    thresholds = {trigger["metadata"]["threshold"] for trigger in only(documents, "ScaledObject")["spec"]["triggers"]}
    assert thresholds == {"3000000", "4000000"}


def _refused(path: str, mode: str, options: set[str]) -> set[str]:
    """Those of ``options`` that the chart does not take there."""
    given = [f"{option}=x" for option in sorted(options) if option.startswith("--")]
    try:
        render(merged(preset("cpu-demo"), at("engine.mode", mode), at(path, given), {"sizing": None}))
    except helm_python.HelmRenderError as error:
        found = re.findall(rf"{re.escape(path)}: (--[^:]*):", str(error))
        return set(found[0].split(", "))
    return set()


@pytest.mark.parametrize(
    ("path", "mode", "command"),
    [
        ("model.extraArgs", "lws", "remuda engine"),
        ("model.extraArgs", "kuberay", "remuda engine"),
        ("model.extraArgs", "single", "remuda serve"),
        ("frontend.extraArgs", "lws", "remuda frontend"),
    ],
)
def test_options_that_the_chart_gives_are_given_once(path: str, mode: str, command: str) -> None:
    """Under none of their names: the later one would win."""
    group: Any = typer.main.get_command(app)
    parameters = group.commands[command.removeprefix("remuda ")].params
    used = set[str]()
    for case in combinations():
        if case["mode"] == mode and case["options"] == "none" and case["placement"] != "all":
            used |= _options_of(render(values_of(case)))[command]
    more = merged(
        preset("cpu-demo"),
        at("engine.mode", mode),
        {"model": {"quantization": "int8", "maxNumSeqs": 8}, "sizing": None},
    )
    used |= _options_of(render(more))[command]
    names = {name for one in parameters if used & set(one.opts) for name in one.opts}
    refused = _refused(path, mode, _built()[command])
    assert used <= names <= refused <= _built()[command]
    assert _refused(path, mode, _built()[command] - refused) == set()


def test_options_of_front_ends_are_not_given_to_engines() -> None:
    """All of `remuda serve` that `remuda engine` lacks: it would not start."""
    built = _built()
    missing = built["remuda serve"] - built["remuda engine"]
    of_front_ends = _refused("model.extraArgs", "lws", missing)
    assert "--request-timeout" in of_front_ends and of_front_ends <= built["remuda frontend"]
    assert _refused("frontend.extraArgs", "lws", of_front_ends) == set()
    assert _refused("model.extraArgs", "lws", missing - of_front_ends) == missing - of_front_ends


def test_front_ends_check_by_what_the_engines_follow() -> None:
    pool: Values = {"inferencePool": {"enabled": True, "extensionService": "epp"}, "auth": {"insecure": True}}
    shared = {"--guided-decoding-backend=xgrammar", "--max-lora-rank=8"}
    given = at("model.extraArgs", [*sorted(shared), "--enable-eplb"])
    documents = render(merged(preset("405b-bf16"), pool, given, {"sizing": None}))
    found = [set(arguments) for command, arguments in _commands(documents) if command == "remuda frontend"]
    assert len(found) == 2 and all(shared <= arguments and "--enable-eplb" not in arguments for arguments in found)


def test_a_replica_waits_for_a_lost_host_as_long_as_hosts_take_to_start() -> None:
    documents = render(merged(preset("405b-bf16"), at("engine.startupMinutes", 45)))
    (arguments,) = [found for command, found in _commands(documents) if command == "remuda engine"]
    assert "--host-wait=2700" in arguments
    assert only(documents, "Deployment", "frontend")["spec"]["progressDeadlineSeconds"] > 2700


@pytest.mark.parametrize("mode", ["lws", "kuberay"])
def test_a_leader_listens_where_no_outgoing_connection_begins(mode: str) -> None:
    """It is the last to listen on its host: Ray and the ranks have connections by then."""
    documents = render(merged(preset("405b-bf16"), at("engine.mode", mode)))
    ports = {
        argument.partition("=")[2]
        for command, arguments in _commands(documents)
        if command == "remuda engine"
        for argument in arguments
        if argument.startswith("--leader-port=")
    }
    (port,) = {int(port) for port in ports} | {LEADER_PORT}
    assert 1024 < port < FIRST_OUTGOING_PORT


def test_arguments_of_single_pods_are_good_values() -> None:
    """`remuda serve` itself reads them."""
    values = merged(
        preset("cpu-demo"),
        {"model": {"quantization": "int8", "maxNumSeqs": 8, "maxLen": 512, "servedName": "tiny"}, "sizing": None},
    )
    ((_, arguments),) = [found for found in _commands(render(values)) if found[0] == "remuda serve"]
    model, *options = arguments
    given = dict(option.removeprefix("--").split("=", 1) for option in options)
    config = load_serve_config({"model": model, **{name.replace("-", "_"): value for name, value in given.items()}})
    assert (config.name, config.max_num_seqs, config.max_model_len, config.quantization) == ("tiny", 8, 512, "int8")
    assert (config.host, config.tensor_parallel_size, config.cpu_slots) == ("0.0.0.0", 2, 2)
    assert config.drain_timeout == 60 and config.kv_cache_memory == 1519 * 2**20


def _security(values: Values, tmp_path: Path) -> tuple[Document, Document]:
    """The mounted file, and what --security-file makes of it."""
    text = only(render(merged(preset("405b-bf16"), values)), "ConfigMap", "security")["data"]["security.yaml"]
    file = tmp_path / "security.yaml"
    file.write_text(text)
    return yaml.safe_load(text), load_security(file, None).model_dump()


_CERTIFIED: Values = {
    "tls": {"clients": {"enabled": True, "existingSecret": "tls", "requireCertificate": True}},
    "auth": {
        "existingSecret": "keys",
        "gateways": [{"name": "dns:edge.example"}],
        "certificates": [{"name": "uri:spiffe://a/b", "tenant": "batch", "scopes": ["infer", "metrics"]}],
        "jwt": [
            {
                "issuer": "https://i.example",
                "audience": "llm",
                "jwks": "https://i.example/keys",
                "tenant_claim": "org",
                "scope_claim": "scope",
                "scopes": {"llm": "infer"},
                "algorithms": ["ES256"],
                "leeway_s": 10,
                "tenants": {"a": "b"},
            }
        ],
    },
}


def test_the_security_file_is_one_that_remuda_reads(tmp_path: Path) -> None:
    written, read = _security({}, tmp_path)
    assert written == {"api_keys": {"file": "/etc/remuda/keys/api-keys"}}
    assert read["tls"] is None and str(read["api_keys"]["file"]) == "/etc/remuda/keys/api-keys"
    written, read = _security(_CERTIFIED, tmp_path)
    assert str(read["tls"]["client_ca_file"]) == "/etc/remuda/tls/ca.crt" and read["tls"]["health_port"] == 8080
    assert read["jwt"][0]["tenant_claim"] == "org" and read["gateways"][0]["name"] == "dns:edge.example"
    assert _security(at("auth.insecure", True), tmp_path)[0] == {}


def test_front_ends_and_leaders_know_each_others_certificates(tmp_path: Path) -> None:
    values = merged(preset("405b-bf16"), at("tls.internal", {"enabled": True, "existingSecret": "a-tls"}))
    files = only(render(values), "ConfigMap", "security")["data"]
    found = []
    for name in ("security.yaml", "engine.yaml"):
        (tmp_path / name).write_text(files[name])
        found.append(load_security(tmp_path / name, None).cluster)
    assert found[0] == found[1] and found[0] is not None and str(found[0].ca_file) == "/etc/remuda/internal-tls/ca.crt"
    issued = {"enabled": True, "certManager": {"enabled": True, "issuerName": "ca"}}
    certificate = only(render(merged(preset("405b-bf16"), at("tls.internal", issued))), "Certificate", "internal-tls")
    assert certificate["spec"]["dnsNames"] == [CLUSTER_NAME]


@pytest.mark.parametrize("mode", ["lws", "single"])
def test_front_ends_and_leaders_send_traces_to_one_collector(mode: str) -> None:
    """Which they may reach, wherever a network policy is."""
    endpoint = "https://collector.monitoring:4317"
    traced = {"engine": {"mode": mode}, "monitoring": {"otlpEndpoint": endpoint}, "networkPolicy": {"enabled": True}}
    documents = render(merged(preset("cpu-demo"), traced))
    given = {command for command, arguments in _commands(documents) if f"--otlp-endpoint={endpoint}" in arguments}
    assert given == ({"remuda serve"} if mode == "single" else {"remuda frontend", "remuda engine"})
    assert otlp_endpoint(endpoint, {}) == endpoint
    policies = of_kind(documents, "NetworkPolicy")
    assert policies and all({"ports": [{"port": 4317}]} in policy["spec"]["egress"] for policy in policies)


def test_the_tenants_file_is_one_that_remuda_reads() -> None:
    limits = {
        "default": {"requests_per_minute": 60},
        "tenants": {
            "search": {"tokens_per_minute": 200_000, "max_queued_requests": 0, "models": ["llama"], "weight": 2},
            "batch": {"weight": 0.5, "priority": 10, "max_concurrent_requests": 4},
        },
    }
    documents = render(merged(preset("405b-bf16"), at("tenants.limits", limits)))
    policies = parse_policies(only(documents, "ConfigMap", "security")["data"]["tenants.yaml"], "values")
    assert policies.default.requests_per_minute == 60 and policies.of("search").tokens_per_minute == 200_000
    assert policies.engine_tenant("batch").priority == 10


def test_every_file_that_a_command_names_is_mounted() -> None:
    for case in combinations():
        documents = render(values_of(case))
        for pod in all_pods(documents):
            for container in containers(pod):
                mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
                named = re.findall(r"/(?:etc/remuda|models)/[\w./-]+", " ".join(container.get("args", [])))
                named += [
                    value for value in (one.get("value", "") for one in container.get("env", [])) if "/etc/" in value
                ]
                for path in named:
                    assert any(path.startswith(mount + "/") or path == mount for mount in mounts), (path, mounts)


def test_front_ends_do_not_get_rays_token() -> None:
    documents = render(preset("405b-bf16"))
    volumes = only(documents, "Deployment", "frontend")["spec"]["template"]["spec"]["volumes"]
    (secret,) = [volume["secret"] for volume in volumes if volume["name"] == "cluster-secret"]
    assert [item["key"] for item in secret["items"]] == ["cluster-secret"]
    assert all("SECRET" not in str(one.get("value", "")) for pod in all_pods(documents) for one in _env(pod))


def _env(pod: Document) -> list[Document]:
    return [variable for container in containers(pod) for variable in container.get("env", [])]


@pytest.mark.parametrize(("mode", "variable"), [("lws", "LWS_LEADER_ADDRESS"), ("kuberay", "FQ_RAY_IP")])
def test_workers_join_their_own_leader(mode: str, variable: str) -> None:
    documents = render(merged(preset("405b-bf16"), at("engine.mode", mode)))
    ((_, arguments),) = [found for found in _commands(documents) if found[0] == "remuda worker"]
    assert f"--head=$({variable}):6379" in arguments


def test_names_reach_discovery() -> None:
    documents = render(preset("405b-bf16"))
    ((_, arguments),) = [found for found in _commands(documents) if found[0] == "remuda frontend"]
    (target,) = [one.removeprefix("--discover=kubernetes:") for one in arguments if one.startswith("--discover=")]
    namespace, _, service = target.partition("/")
    assert namespace == "$(POD_NAMESPACE)" and service in {
        one["metadata"]["name"] for one in of_kind(documents, "Service")
    }
    assert PORT_NAME in [port["name"] for port in only(documents, "Service", "leaders")["spec"]["ports"]]
    (role,) = of_kind(documents, "Role")
    assert {"endpointslices"} == {name for rule in role["rules"] for name in rule["resources"]}
    assert {verb for rule in role["rules"] for verb in rule["verbs"]} == {"list", "watch"}
    assert only(documents, "RoleBinding")["subjects"][0]["namespace"] == NAMESPACE
