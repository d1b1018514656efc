"""Both forms of expert parallelism are compared, the better is chosen, and what is printed is what serve takes."""

import io
import json
import shlex

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cluster.cli.main import app
from cluster.cli.plan_text import WIDTH, print_plan
from cluster.config import load_serve_config
from cluster.control.memory import plan_memory
from cluster.control.preflight import preflight
from cluster.plan.devices import parse_machines
from cluster.plan.dispatch import DecodeEstimate
from cluster.plan.layouts import Degrees
from cluster.plan.link_notices import parse_link
from cluster.plan.make_report import make_report, plan_options
from cluster.plan.report import PlanReport, as_object, dispatch_reason, layout_text
from cluster.plan.search import LayoutSearch
from engine.config import Determinism, ParallelConfig
from tests.plan.models import PARAMS, found

SCOUT = "Llama-4-Scout-17B-16E-Instruct"
NAMES = {
    "tp": "tensor_parallel_size",
    "pp": "pipeline_parallel_size",
    "dp": "data_parallel_size",
    "ep": "expert_parallel_size",
}


def report_of(name: str, gpus: str, fixed: Degrees | None = None, link: str | None = None) -> PlanReport:
    model, machines = found(name), parse_machines(gpus)
    known = None if link is None else parse_link(link)
    return make_report(model, machines, fixed or Degrees(), plan_options(model, machines), known)


def forms(report: PlanReport) -> tuple[DecodeEstimate, DecodeEstimate]:
    """(replicated, all-to-all)"""
    choice = report.plan.dispatch
    assert choice is not None and choice.replicated is not None and choice.exchanged is not None
    return choice.replicated, choice.exchanged


def test_where_ranks_would_keep_the_same_keys_and_values_attention_is_replicated() -> None:
    """Four KV heads on eight ranks."""
    report = report_of("Qwen3-30B-A3B", "8xH100-80")
    alone = report_of("Qwen3-30B-A3B", "8xH100-80", Degrees(dp=1))
    assert report.plan.fits and report.plan.layout == ParallelConfig(tp=4, dp=2, ep=8)
    assert alone.plan.layout == ParallelConfig(tp=8, ep=8) and alone.plan.dispatch is None
    assert report.plan.kv_tokens > 1.9 * alone.plan.kv_tokens
    replicated, exchanged = forms(report)
    assert (replicated.layout, replicated.kv_tokens) == (alone.plan.layout, alone.plan.kv_tokens)
    assert (exchanged.layout, exchanged.kv_tokens) == (report.plan.layout, report.plan.kv_tokens)
    assert exchanged.tokens_per_s > 1.1 * replicated.tokens_per_s


@pytest.mark.parametrize("name", ["Mixtral-8x7B", SCOUT])
def test_as_many_kv_heads_as_ranks_need_no_attention_replicas(name: str) -> None:
    """They would read the dense weights more often, and nothing less."""
    report = report_of(name, "8xH100-80")
    assert report.plan.layout == ParallelConfig(tp=8, ep=8)
    replicated, exchanged = forms(report)
    assert exchanged.layout.dp > 1 and exchanged.tokens_per_s < replicated.tokens_per_s
    assert exchanged.kv_tokens < replicated.kv_tokens


def test_the_link_decides_between_stages_and_exchanges_over_hosts() -> None:
    """Two micro-batches each read nearly all experts; spread over both hosts they are read once."""
    fast = report_of("Mixtral-8x22B", "2x8xH100-80", link="0.01ms,3200Gbit")
    slow = report_of("Mixtral-8x22B", "2x8xH100-80", link="5ms,1Gbit")
    unknown = report_of("Mixtral-8x22B", "2x8xH100-80")
    assert fast.plan.layout == ParallelConfig(tp=8, dp=2, ep=8)
    assert slow.plan.layout == unknown.plan.layout == ParallelConfig(tp=8, pp=2, ep=8)
    assert forms(fast)[1].tokens_per_s > forms(slow)[1].tokens_per_s
    assert forms(unknown)[1].layout.dp * forms(unknown)[1].layout.tp <= 8, "within a host"
    assert "only with --link" in str(dispatch_reason(unknown.plan))
    assert "only with --link" not in str(dispatch_reason(fast.plan))


def test_the_estimate_is_the_bytes_that_are_read() -> None:
    """From published counts: 256 requests of 4,096 tokens on 8 ranks meet all 8 experts."""
    replicated, _ = forms(report_of("Mixtral-8x7B", "8xH100-80"))
    assert replicated.num_requests == 256
    published = PARAMS["Mixtral-8x7B"]
    embedding = 32000 * 4096
    num_bytes = 2 * (published["total"] - embedding) + 256 * 4096 * published["kv_bytes_per_token_bf16"]
    assert replicated.tokens_per_s == pytest.approx(256 / (num_bytes / 8 / 3350e9), rel=0.01)


def test_the_nearest_layout_may_have_attention_replicas() -> None:
    """Four such devices are too few, on eight there would be two of each KV head."""
    model, machines = found("Qwen3-30B-A3B"), parse_machines("1xSmall-18")
    nearest = LayoutSearch(model.shapes, plan_options(model, machines)).nearest(machines)
    assert nearest is not None and nearest.fits and nearest.machines.num_devices == 8
    assert nearest.layout == ParallelConfig(tp=4, dp=2, ep=8)
    assert nearest.dispatch is not None and nearest.dispatch.exchanged is not None


def test_what_the_user_fixes_stays() -> None:
    model = "Qwen3-30B-A3B"
    assert report_of(model, "8xH100-80", Degrees(tp=8)).plan.layout == ParallelConfig(tp=8, ep=8)
    assert report_of(model, "8xH100-80", Degrees(dp=4)).plan.layout.dp == 4
    fixed = report_of(model, "8xH100-80", Degrees(tp=2, pp=1, ep=8)).plan
    assert fixed.layout == ParallelConfig(tp=2, dp=4, ep=8), "ep divides no other dp × tp"
    assert fixed.dispatch is not None and fixed.dispatch.replicated is None
    strict = report_of(model, "8xH100-80", Degrees(determinism=Determinism.D2))
    assert strict.plan.layout.dp == 1 and strict.plan.dispatch is None, "D2 has no exchanges"
    assert report_of("Llama-3.1-8B", "8xH100-80").plan.dispatch is None


def test_people_and_programs_are_told_why() -> None:
    report = report_of("Qwen3-30B-A3B", "8xH100-80")
    replicated, exchanged = forms(report)
    console = Console(width=WIDTH, file=io.StringIO(), record=True, markup=False, highlight=False)
    print_plan(report, console)
    text = console.export_text()
    assert max(len(line) for line in text.splitlines()) <= WIDTH
    said = " ".join(text.split())
    assert "--tp 4 --dp 2 --ep 8; expert dispatch: all-to-all" in said
    for estimate in (replicated, exchanged):
        figures = f"{estimate.tokens_per_s:,.0f} tokens/s, 256 at once, room for {estimate.kv_tokens:,} tokens"
        assert f"({layout_text(estimate.layout)}) {figures}" in said
    choice = as_object(report)["expert_dispatch_choice"]
    assert (choice["num_requests"], choice["context_len"], choice["least_gain"]) == (256, 4096, 0.1)
    assert choice["all_to_all"]["layout"] == as_object(report)["layout"]
    assert choice["replicated"]["kv_cache_tokens"] == replicated.kv_tokens
    assert as_object(report_of("Llama-3.1-8B", "2xH100-80"))["expert_dispatch_choice"] is None


@pytest.mark.parametrize(("gpus", "form"), [("2xcpu-2", "replicated"), ("8xcpu-2", "all-to-all")])
def test_what_plan_prints_is_what_serve_takes(gpus: str, form: str) -> None:
    result = CliRunner().invoke(app, ["plan", "remuda-tiny", "--gpus", gpus, "--json"])
    answer = json.loads(result.stdout)
    assert answer["expert_dispatch"] == form
    printed = CliRunner().invoke(app, ["plan", "remuda-tiny", "--gpus", gpus]).stdout
    (line,) = [line for line in printed.splitlines() if "usable on each" in line]
    words = shlex.split(line.partition("): ")[2].partition(";")[0])
    degrees = {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)}
    assert {name: int(degrees.get(name, 1)) for name in NAMES} == answer["layout"]
    options = {NAMES[name]: value for name, value in degrees.items()}
    launch = preflight(load_serve_config({"device": "cpu", "kv_cache_memory": "8MiB", **options})).launch
    served = launch.replica.parallel
    assert {"tp": served.tp, "pp": served.pp, "dp": served.dp, "ep": served.ep} == answer["layout"]
    assert served.exchanges_tokens == (form == "all-to-all")
    planned = plan_memory(launch.replica, served.num_ranks)
    assert planned.weight_bytes == [rank["weight_bytes"] for rank in answer["ranks"]]
