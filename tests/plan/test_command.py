"""``remuda plan`` as it is typed."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cluster.cli.main import app
from cluster.cli.plan_text import WIDTH, print_plan
from cluster.plan.devices import parse_machines
from cluster.plan.layouts import Degrees
from cluster.plan.link_cost import pipeline_loss
from cluster.plan.link_notices import parse_link
from cluster.plan.make_report import make_report, plan_options
from cluster.plan.source import find_model
from engine.errors import CheckpointError, InvalidOption, LayoutError
from tests.plan.models import DATA, found


def remuda(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "cluster.cli.main", "plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def test_json_is_one_object_on_standard_output() -> None:
    result = remuda(str(DATA / "Llama-3.1-405B.json"), "--gpus", "8xH100-80", "--json")
    assert result.returncode == 0 and result.stderr == ""
    answer: dict[str, Any] = json.loads(result.stdout)
    assert answer["fits"] is False and len(answer["reasons"]) == 1
    assert answer["model"] == "Llama-3.1-405B" and answer["layout"] == {"tp": 8, "pp": 1, "dp": 1, "ep": 1}
    assert answer["nearest"]["num_hosts"] == 2
    assert answer["nearest"]["layout"] == {"tp": 8, "pp": 2, "dp": 1, "ep": 1}
    assert answer["licence"]["attribution"] == "Built with Llama"


def test_bad_input_is_one_line_and_status_2() -> None:
    result = remuda("remuda-tiny", "--gpus", "2xcpu-4", "--tp", "3")
    assert result.returncode == 2 and result.stdout == ""
    assert "needs 3 devices; there are 2" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "8xNothing"], "write its memory in GiB"),
        (["--gpus", "1xcpu-4", "--dtype", "float16"], "--dtype float16 is not known"),
        (["--gpus", "1xT4-16", "--gpu-memory-utilization", "1.5"], "at most 1, not 1.5"),
        (["--gpus", "1xcpu-4", "--max-model-len", "9999"], "more than the model's 2048"),
        (["--gpus", "1xcpu-4", "--max-num-seqs", "9", "--max-num-batched-tokens", "8"], "must be at least"),
        (["--gpus", "1xcpu-4", "--quantization", "int3"], "int3"),
        (["--gpus", "1xcpu-4", "--deterministic=d3"], "use d1, d2 or off"),
        (["--gpus", "1xcpu-4", "--quantization", "int8", "--deterministic"], "activations are rounded to int8"),
        (["--gpus", "4xcpu-4", "--dp", "2", "--deterministic", "d2"], "d2 does not serve dp=2"),
    ],
)
def test_bad_options_are_named(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["plan", "remuda-tiny", *arguments])
    assert isinstance(result.exception, InvalidOption | LayoutError)
    assert message in str(result.exception)


@pytest.mark.parametrize(
    ("name", "gpus", "said"),
    [
        (
            "Llama-3.1-405B",
            "16xH100-80",
            ["ranks 0–7", "ranks 8–15", "fits: requests of up to 131,072", "--tp 8 --pp 2"],
        ),
        ("Llama-3.1-405B", "8xH100-80", ["does not fit", "30,821,", "nearest that fits: 2 × 8 × H100-80"]),
        ("Llama-4-Maverick-17B-128E-Instruct-FP8", "8xH100-80", ["bounded: at most", "European Union", "only text"]),
        ("Gemma-3-27B", "4xA100-80", ["is not served by this version", "81,920 once 1,024 more have come"]),
        ("Llama-3.1-8B", "2xcpu-32", ["process", "131,072 bytes a token"]),
    ],
)
def test_people_read_it_in_100_columns(name: str, gpus: str, said: list[str]) -> None:
    model, machines = found(name), parse_machines(gpus)
    console = Console(width=WIDTH, file=io.StringIO(), record=True, markup=False, highlight=False)
    print_plan(make_report(model, machines, Degrees(), plan_options(model, machines)), console)
    text = console.export_text()
    assert max(len(line) for line in text.splitlines()) <= 100
    for words in said:
        assert words in " ".join(text.split()), words


def test_models_are_found_by_directory_file_and_name(tmp_path: Path) -> None:
    config = (DATA / "Llama-3.2-1B.json").read_text()
    (tmp_path / "Some-Model").mkdir()
    (tmp_path / "Some-Model" / "config.json").write_text(config)
    assert find_model(str(tmp_path / "Some-Model")).name == "Some-Model"
    assert find_model(str(tmp_path / "Some-Model" / "config.json")).name == "Some-Model"
    assert find_model("remuda-tiny").shapes.is_served
    tiny = find_model("remuda-tiny", quantization="int8")
    assert tiny.shapes.config.quantization is not None
    with pytest.raises(CheckpointError, match="the hub's cache"):
        find_model("nobody/nothing")
    with pytest.raises(InvalidOption, match="quantized already"):
        find_model(str(DATA / "Llama-3.1-405B-FP8.json"), quantization="int8")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        find_model(str(tmp_path / "broken.json"))
    (tmp_path / "other.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    with pytest.raises(CheckpointError, match="GPT2LMHeadModel.*plan also knows.*Phi3ForCausalLM"):
        find_model(str(tmp_path / "other.json"))


def test_a_model_of_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--some--model" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text((DATA / "Llama-3.2-1B.json").read_text())
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert find_model("some/model").name == "some/model"


def test_a_tensor_parallel_group_across_hosts_is_warned_about_with_what_it_waits_for() -> None:
    def notices(gpus: str) -> list[str]:
        result = CliRunner().invoke(app, ["plan", "remuda-tiny", "--gpus", gpus, "--tp", "4", "--json"])
        told: list[str] = json.loads(result.stdout)["notices"]
        return told

    assert notices("1x4xcpu-4") == []
    (crossing,) = notices("2x2xcpu-4")
    # Two all-reduces in each of eight layers, and the embedding's.
    assert "--tp 4 crosses hosts of 2: every step waits for 17 collectives" in crossing


def test_what_a_link_costs_a_layout_is_predicted() -> None:
    def notices(gpus: str, *arguments: str) -> list[str]:
        result = CliRunner().invoke(app, ["plan", "remuda-tiny", "--gpus", gpus, "--json", *arguments])
        told: list[str] = json.loads(result.stdout)["notices"]
        return told

    (slow,) = notices("2x2xcpu-4", "--tp", "4", "--link", "5ms,1Gbit")
    assert "17 collectives" in slow and "100% is lost" in slow, "85 ms of waiting beside a tiny model's weights"
    (fast,) = notices("2x2xcpu-4", "--tp", "4", "--link", "0us,1000000Gbit")
    assert ": 0% is lost" in fast
    assert notices("1x4xcpu-4", "--tp", "4", "--link", "5ms,1Gbit") == []
    (stages,) = notices("2x1xcpu-4", "--pp", "2", "--tp", "1", "--link", "5ms,1Gbit")
    # Over and back, and the rows of four tokens.
    assert stages.startswith("--pp 2 crosses hosts 1 times: a token takes 10.0")
    exchanges = notices("2x1xcpu-4", "--dp", "2", "--tp", "1", "--pp", "1", "--ep", "2", "--link", "5ms,1Gbit")
    assert len(exchanges) == 1 and "exchanges, which take" in exchanges[0]


@pytest.mark.parametrize("link", ["5", "5ms", "5ms,0Gbit", "-1ms,1Gbit", "5ms,1"])
def test_a_link_that_cannot_be_read_is_refused(link: str) -> None:
    with pytest.raises(InvalidOption, match="--link"):
        parse_link(link)


def test_micro_batches_in_flight_hide_a_link() -> None:
    assert pipeline_loss(stage_s=0.02, pp=2, num_in_flight=2, link_s=0.01) == pytest.approx(0.2)
    assert pipeline_loss(stage_s=0.02, pp=2, num_in_flight=3, link_s=0.01) == 0
    assert pipeline_loss(stage_s=0.02, pp=2, num_in_flight=1, link_s=0.04) == pytest.approx(0.5)
