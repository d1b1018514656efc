"""Presets and `remuda plan --format helm`: what plan says fits is what the chart installs."""

import pytest
import yaml
from typer.testing import CliRunner

from cluster.cli.main import app
from cluster.plan.helm_values import helm_values, helm_values_text
from cluster.plan.layouts import Degrees
from cluster.plan.make_report import plan_model
from engine.errors import LayoutError
from tests.chart.presets import QUESTIONS, preset_text, report_of
from tests.chart.rendering import CHART, PRESETS, Values, only, preset, render
from tests.plan.models import DATA

_PRODUCT = {"405b-bf16": (2, 8), "405b-fp8": (1, 8), "maverick-fp8": (1, 8), "70b": (1, 4), "scout": (1, 4)}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_plans_answer(name: str) -> None:
    assert (CHART / f"values-{name}.yaml").read_text() == preset_text(name), "make chart-golden"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fits_and_gives_each_host_its_devices(name: str) -> None:
    report = report_of(QUESTIONS[name])
    assert report.plan.fits and report.plan.max_model_len >= 2048
    documents = render(preset(name))
    if name == "cpu-demo":
        container = only(documents, "Deployment")["spec"]["template"]["spec"]["containers"][0]
        assert "--cpu-slots=2" in container["args"] and "nvidia.com/gpu" not in container["resources"]["limits"]
        return
    template = only(documents, "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]
    hosts, per_host = _PRODUCT[name]
    assert template["size"] == hosts == report.plan.machines.num_hosts
    for pod in (template["leaderTemplate"], template["workerTemplate"]):
        assert pod["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == per_host
    layout = report.plan.layout
    arguments = template["leaderTemplate"]["spec"]["containers"][0]["args"]
    assert {
        f"--tensor-parallel-size={layout.tp}",
        f"--pipeline-parallel-size={layout.pp}",
        f"--data-parallel-size={layout.dp}",
        f"--expert-parallel-size={layout.ep}",
    } <= set(arguments)


def _values(model: str, gpus: str, degrees: Degrees | None = None, **wanted: object) -> Values:
    quantization = wanted.pop("quantization", None)
    report = plan_model(str(DATA / f"{model}.json"), gpus, degrees or Degrees(), quantization=quantization, **wanted)  # type: ignore[arg-type]
    values = helm_values(report, quantization)  # type: ignore[arg-type]
    assert yaml.safe_load(helm_values_text(report, quantization)) == values  # type: ignore[arg-type]
    return values


def test_what_was_asked_of_plan_is_in_the_values() -> None:
    values = _values(
        "Mixtral-8x7B",
        "2x4xA100-80",
        Degrees(tp=2, dp=4, ep=8, num_redundant_experts=8, balances_experts=True),
        quantization="int8",
        max_model_len=4096,
        max_num_seqs=32,
        max_num_batched_tokens=1024,
        utilization=0.8,
    )
    assert values["parallel"] == {"tensor": 2, "pipeline": 1, "data": 4, "expert": 8}
    assert (values["engine"]["hosts"], values["engine"]["devicesPerHost"]) == (1, 8) or (
        values["engine"]["hosts"] * values["engine"]["devicesPerHost"] == 8
    )
    arguments = set(
        only(render(values), "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]["leaderTemplate"]["spec"]["containers"][
            0
        ]["args"]
    )
    assert {
        "--quantization=int8",
        "--max-model-len=4096",
        "--max-num-seqs=32",
        "--max-num-batched-tokens=1024",
        "--gpu-memory-utilization=0.8",
        "--enable-eplb",
        "--num-redundant-experts=8",
    } <= arguments


def test_only_the_devices_of_the_layout_are_asked_for() -> None:
    """32 heads divide by two of three devices."""
    values = _values("Llama-3.1-8B", "1x3xL40S-48", Degrees(tp=2))
    assert values["parallel"]["tensor"] == values["engine"]["devicesPerHost"] == 2
    assert render(values)


@pytest.mark.parametrize(
    ("model", "gpus", "degrees", "words"),
    [
        ("Llama-3.1-405B", "8xH100-80", Degrees(), "nearest that fits: 2 × 8 × H100-80 with --tp 8 --pp 2"),
        ("Phi-4", "8xH100-80", Degrees(), "is not served"),
        ("Llama-3.1-8B", "2x4xL40S-48", Degrees(tp=8), "give --tp 4 or less"),
        ("Llama-3.1-8B", "2x2xL40S-48", Degrees(tp=1, pp=3), "do not divide evenly"),
    ],
)
def test_no_values_for_what_plan_refuses(model: str, gpus: str, degrees: Degrees, words: str) -> None:
    report = plan_model(str(DATA / f"{model}.json"), gpus, degrees)
    with pytest.raises(LayoutError) as raised:
        helm_values(report)
    assert words in str(raised.value)


def test_the_command() -> None:
    result = CliRunner().invoke(app, ["plan", "remuda-tiny", "--gpus", "2xcpu-2", "--format", "helm"])
    assert (result.exit_code, result.stdout) == (0, (CHART / "values-cpu-demo.yaml").read_text())
    for wrong in (["--format", "yaml"], ["--format", "helm", "--json"]):
        result = CliRunner().invoke(app, ["plan", "remuda-tiny", "--gpus", "2xcpu-2", *wrong])
        assert result.exit_code != 0 and "--format" in str(result.exception)
