"""The GPU's benchmark where there is no GPU: what its checks do is done here on the CPU, so that they are known to pass
what is right and to find what is wrong."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench import gpu, gpu_serving, gpu_steps
from bench.gpu_checks import CHECKS, NotChecked, _tiny, _tiny_logits, whole_steps
from bench.gpu_model import CacheShape, GpuModel, cache_bytes
from bench.gpu_serving import (
    CASES,
    DEPTHS,
    GANGS,
    Case,
    Served,
    check_gang,
    check_served,
    difference,
    expected_of,
    serve,
)
from bench.measure import Row, row
from engine.config import Dtype, ParallelConfig
from engine.layer_config import LayerConfig
from engine.model_config import ModelConfig
from engine.request import TopLogprobs
from engine.rope_config import RopeConfig

PLAIN = CASES[0]
ROPE = RopeConfig(theta=10000.0, head_dim=32, original_max_positions=1000)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["bench.gpu"])
    assert gpu.main() == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_what_the_checks_compare_with_runs_on_the_cpu() -> None:
    """The reference of the whole-model checks: finite, and the same in another run."""
    found = _tiny_logits(_tiny(Dtype.FLOAT32, torch.device("cpu")))
    assert found.shape[0] == 9 and torch.isfinite(found).all()
    assert torch.equal(found, _tiny_logits(_tiny(Dtype.FLOAT32, torch.device("cpu"))))


def test_two_kinds_of_attention_are_compared_in_whole_steps() -> None:
    worst, bound = whole_steps("cpu", "reference", torch.device("cpu"))
    assert worst <= bound


@pytest.mark.skipif(importlib.util.find_spec("flashinfer") is not None, reason="is about machines without FlashInfer")
def test_flashinfer_is_named_where_it_is_missing() -> None:
    checks = {name: made for name, made in CHECKS.items() if "FlashInfer" in name}
    assert len(checks) == 7
    for made in checks.values():
        assert gpu.judge(made) == (gpu.NOT_CHECKED, "FlashInfer is not installed (pip install flashinfer-python)")


def test_a_served_model_is_checked() -> None:
    """The function that a GPU is checked by, on the CPU: with preemptions, prefix hits and two plans in flight."""
    worst, bound = check_served(PLAIN, 2, "cpu")
    assert worst <= bound


@pytest.mark.full
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_way_to_serve_is_checked(case: Case, depth: int) -> None:
    worst, bound = check_served(case, depth, "cpu")
    assert worst <= bound


@pytest.mark.full
@pytest.mark.parametrize("layout", GANGS, ids=lambda layout: layout.product)
def test_gangs_are_checked(layout: ParallelConfig) -> None:
    worst, bound = check_gang(layout, "cpu")
    assert worst <= bound


@pytest.mark.full
@pytest.mark.parametrize("name", ["int4", "LoRA", "grammar"])
def test_another_model_is_found_out(name: str) -> None:
    """Weights rounded to four bits, an adapter that is left out, a grammar that nobody follows."""
    other = next(case for case in CASES if case.name == name)
    assert difference(serve(PLAIN, 2, "cpu"), expected_of(other)) > PLAIN.bound


def made_up(*token_ids: int, logprob: float = -0.5) -> Served:
    entries = [TopLogprobs(logprob, 1, [5, 6], [logprob, -0.75]) for _ in token_ids]
    return Served({"a": list(token_ids)}, {"a": entries})


@pytest.mark.parametrize(
    ("found", "expected", "worst"),
    [
        (made_up(5, 5), made_up(5, 5), 0.0),
        (made_up(5, 5, logprob=-0.6), made_up(5, 5), 0.1),
        (made_up(6, 5), made_up(5, 5), 0.25),  # nearly as likely; what follows has another past
        (made_up(5, 9), made_up(5, 5), float("inf")),
        (made_up(5), made_up(5, 5), float("inf")),
    ],
)
def test_a_difference_is_measured(found: Served, expected: Served, worst: float) -> None:
    assert difference(found, expected) == pytest.approx(worst)


def test_a_run_that_shows_nothing_is_refused() -> None:
    Served(num_preemptions=1, num_cached_tokens=16, most_in_flight=2).require(2)
    for easy in (
        Served(num_preemptions=0, num_cached_tokens=16, most_in_flight=2),
        Served(num_preemptions=1, num_cached_tokens=0, most_in_flight=2),
        Served(num_preemptions=1, num_cached_tokens=16, most_in_flight=1),
    ):
        with pytest.raises(RuntimeError, match="shows nothing"):
            easy.require(2)
    with pytest.raises(RuntimeError, match="other tokens than in company"):
        gpu_serving.require_same_alone(Served({"busy 0": [1, 2], "alone 0": [1, 3]}))


def test_checks_are_judged() -> None:
    def breaks() -> tuple[float, float]:
        raise RuntimeError("a kernel broke")

    def lacks() -> tuple[float, float]:
        raise NotChecked("wants two GPUs")

    assert gpu.judge(lambda: (0.1, 0.2)) == (gpu.OK, "off by 0.1, at most 0.2")
    assert gpu.judge(lambda: (0.3, 0.2))[0] == gpu.FAILED
    assert gpu.judge(lambda: (float("nan"), 0.2))[0] == gpu.FAILED
    verdict, text = gpu.judge(breaks)
    assert verdict == gpu.FAILED and "a kernel broke" in text
    assert gpu.judge(lacks) == (gpu.NOT_CHECKED, "wants two GPUs")


def test_a_section_that_fails_costs_no_other(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    report = gpu.Report(path, Console(quiet=True), {"gpu": "none"})
    figure = row("b", "c", "GB/s", [1.0], [2.0], "higher")

    def breaks() -> Iterator[Row]:
        yield figure
        raise torch.OutOfMemoryError("no memory")

    def goes_on() -> Iterator[Row]:
        assert len(json.loads(path.read_text())["rows"]) == 1, "the section before is written by now"
        yield figure

    report.measure("one", breaks)
    report.measure("two", goes_on)
    report.judged("a check", *gpu.judge_tests(["sleep", "60"], timeout_s=0.1))
    report.judged("another", *gpu.judge_tests(["false"]))
    report.judged("a third", *gpu.judge_tests(["true"]))
    report.leave_out("256 requests")
    report.write()
    written = json.loads(path.read_text())
    assert len(written["rows"]) == 2
    assert written["machine"] == {
        "gpu": "none",
        "failed": ["section one", "a check", "another"],
        "not_checked": [],
        "left_out": ["256 requests"],
    }


def test_the_cache_is_as_large_as_the_largest_step() -> None:
    """Llama-3.1-8B's: two times 32 layers of 8 heads of 128 numbers of two bytes for each token, in blocks of 16."""
    config = gpu_steps.model_config(quick=False)
    a_block = 2 * 32 * 8 * 128 * 2 * 16
    assert cache_bytes(config, gpu_steps.shapes(256), Dtype.BFLOAT16) == (1 + 256 * 65) * a_block < 35e9
    assert cache_bytes(config, gpu_steps.shapes(1), Dtype.BFLOAT16) == (1 + 4096 // 16) * a_block


@pytest.mark.parametrize(
    ("free_gb", "batches"), [(139, [1, 8, 64, 256]), (80, [1, 8, 64, 256]), (40, [1, 8, 64]), (26, [1, 8]), (16, [])]
)
def test_batches_that_do_not_fit_are_left_out(free_gb: float, batches: list[int]) -> None:
    assert gpu_steps.fitting_batches(gpu_steps.model_config(quick=False), int(free_gb * 1e9)) == batches


def test_shapes_share_the_cache() -> None:
    """A step of many short requests, and one of a prompt longer than those; what fits into neither is refused."""
    config = ModelConfig("LlamaForCausalLM", 512, 64, 2, 1, 32, (LayerConfig(64),) * 2, ROPE, 1e-5, 1000)
    cpu = torch.device("cpu")
    model = GpuModel(config, None, Dtype.FLOAT32, cpu, shapes=[CacheShape(4, 40), CacheShape(1, 100)])
    pool = sum(tensor.numel() * 4 for tensor in (*model.cache.key_cache, *model.cache.value_cache))
    assert pool == cache_bytes(config, model.shapes, Dtype.FLOAT32) == 13 * 16 * 32 * 4 * 2 * 2
    assert model.batch([39] * 4, [[5]] * 4).block_tables[0].tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]]
    assert model.batch([0], [[5] * 100]).block_tables[0].tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert torch.isfinite(model.logits(model.batch([0], [[5] * 100]))).all()
    with pytest.raises(ValueError, match="not in list"):
        model.batch([0, 0], [[5] * 100, [5]])


def test_every_case_has_a_check() -> None:
    served = [name for name in CHECKS if name.startswith("served, ")]
    assert len(served) == len(CASES) * len(DEPTHS)
    assert sum("NCCL" in name for name in CHECKS) == len(GANGS)
