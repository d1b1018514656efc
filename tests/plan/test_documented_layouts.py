"""The layouts that these models are known to be served in, and one in which they are not."""

import pytest

from cluster.plan.devices import parse_machines
from cluster.plan.layouts import Degrees
from cluster.plan.make_report import make_report, plan_options
from cluster.plan.report import PlanReport, as_object
from engine.config import ParallelConfig
from engine.errors import InvalidOption, LayoutError
from tests.plan.models import found


def report_of(name: str, gpus: str, fixed: Degrees | None = None, max_model_len: int | None = None) -> PlanReport:
    model, machines = found(name), parse_machines(gpus)
    return make_report(model, machines, fixed or Degrees(), plan_options(model, machines, max_model_len=max_model_len))


def test_405b_on_two_hosts_of_eight() -> None:
    report = report_of("Llama-3.1-405B", "16xH100-80")
    assert report.plan.fits and report.plan.layout == ParallelConfig(tp=8, pp=2)
    assert report.plan.max_model_len == 131072
    assert [rank.host for rank in report.plan.ranks] == [0] * 8 + [1] * 8
    assert "embedding" in report.plan.ranks[0].weights and "head" not in report.plan.ranks[0].weights
    assert "head" in report.plan.ranks[8].weights and "embedding" not in report.plan.ranks[8].weights


def test_405b_in_fp8_on_one_host_of_eight() -> None:
    report = report_of("Llama-3.1-405B-FP8", "8xH100-80")
    assert report.plan.fits and report.plan.layout == ParallelConfig(tp=8)
    assert report.plan.max_model_len == 131072


def test_maverick_in_fp8_on_one_host_of_eight() -> None:
    report = report_of("Llama-4-Maverick-17B-128E-Instruct-FP8", "8xH100-80")
    assert report.plan.fits and report.plan.layout == ParallelConfig(tp=8, ep=8)
    assert any("multimodal" in notice for notice in report.model.licence.notices)


def test_405b_does_not_fit_on_one_host() -> None:
    report = report_of("Llama-3.1-405B", "8xH100-80")
    assert not report.plan.fits and report.plan.max_model_len == 0
    (reason,) = report.plan.reasons
    assert reason.startswith("ranks 0 to 7 lack each 30,8")
    # Its own numbers add up to what it says is missing.
    rank = report.plan.ranks[0]
    one_request = 2 * rank.block_bytes
    assert f"{rank.beside_cache + one_request - rank.budget:,} bytes" in reason
    assert rank.weight_bytes == 101_470_601_216
    assert report.nearest is not None and report.nearest.fits
    assert report.quantized is not None and report.quantized[0] == "fp8" and report.quantized[1].fits
    assert str(report.nearest.machines) == "2 × 8 × H100-80"
    assert report.nearest.layout == ParallelConfig(tp=8, pp=2)


def test_the_nearest_may_be_more_devices_of_the_same_host() -> None:
    report = report_of("Llama-3.1-70B", "1xH100-80")
    assert not report.plan.fits and report.nearest is not None
    assert report.nearest.machines.num_devices == 4 and report.nearest.layout == ParallelConfig(tp=4)


def test_nothing_nearer_than_nothing() -> None:
    report = report_of("Llama-3.1-405B", "1x1xTiny-1")
    assert not report.plan.fits and report.nearest is None


def test_attention_replicas_are_planned_as_they_are_served() -> None:
    """Each has a cache of its own; with them tokens travel to their experts, and their copies take memory."""
    replicated = report_of("Mixtral-8x7B", "8xH100-80", Degrees(tp=8, ep=8))
    exchanged = report_of("Mixtral-8x7B", "8xH100-80", Degrees(tp=2, dp=4, ep=8))
    assert as_object(replicated)["expert_dispatch"] == "replicated"
    assert as_object(exchanged)["expert_dispatch"] == "all-to-all"
    assert as_object(report_of("Llama-3.1-8B", "2xH100-80", Degrees(dp=2)))["expert_dispatch"] is None
    first, second = replicated.plan.ranks[0], exchanged.plan.ranks[0]
    assert first.weights["experts"] == second.weights["experts"]
    assert second.weights["attention"] == 4 * first.weights["attention"]
    assert second.activations > first.activations
    assert exchanged.plan.kv_tokens == 4 * (second.num_blocks - 1) * exchanged.options.block_size


def test_a_longer_context_than_fits_is_a_reason() -> None:
    fitting = report_of("Llama-3.1-8B", "1xL4-24")
    assert fitting.plan.fits and 2 <= fitting.plan.max_model_len < 131072
    longest = fitting.plan.max_model_len
    assert report_of("Llama-3.1-8B", "1xL4-24", max_model_len=longest).plan.fits
    longer = report_of("Llama-3.1-8B", "1xL4-24", max_model_len=longest + 64)
    assert not longer.plan.fits and f"one request of {longest + 64:,} tokens" in longer.plan.reasons[0]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(LayoutError, match="tp=3 does not divide the model's 32 attention heads"):
        report_of("Llama-3.1-8B", "8xH100-80", Degrees(tp=3))
    with pytest.raises(LayoutError, match="needs 16 devices; there are 8"):
        report_of("Llama-3.1-8B", "8xH100-80", Degrees(tp=8, pp=2))
    for fixed in (Degrees(tp=2, ep=2), Degrees(ep=2)):
        with pytest.raises(LayoutError, match="ep=2 needs a mixture of experts"):
            report_of("Llama-3.1-8B", "8xH100-80", fixed)
    with pytest.raises(LayoutError, match="ep=3 does not divide the model's 8 experts"):
        report_of("Mixtral-8x7B", "8xH100-80", Degrees(ep=3))
    with pytest.raises(InvalidOption, match="more than the model's 131072"):
        report_of("Llama-3.1-8B", "8xH100-80", max_model_len=131073)


def test_a_quantized_matrix_sets_limits() -> None:
    """Blocks of 128 columns: 16 ranks would cut those of the 2048-wide experts' 128, 32 would cut them apart."""
    with pytest.raises(LayoutError, match="use a smaller tp"):
        report_of("DeepSeek-V3", "1x32xRoomy-1024", Degrees(tp=32, ep=1))
