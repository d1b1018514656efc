"""What ``remuda bench`` makes of what it saw: percentiles, goodput, warnings, table and plot."""

import io
import json
import random
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from cluster.bench.load import ClientMonitor
from cluster.bench.plot import write_plot
from cluster.bench.report import Report, RunInfo, make_report
from cluster.bench.slo import Slo, parse_slo
from cluster.bench.table import print_report
from cluster.bench.timing import Percentiles, Timing, percentile
from engine.errors import InvalidOption


def timing(sent_s: float, chunks_s: Sequence[float], num_output: int, **changes: object) -> Timing:
    found = Timing(sent_s, chunks_s=list(chunks_s), num_input=100, num_output=num_output, is_counted=True)
    found.finish(chunks_s[-1])
    for name, value in changes.items():
        setattr(found, name, value)
    return found


def failed(message: str) -> Timing:
    return Timing(1.0, ended_s=1.5, error=message)


# Sent at 10 and 11 s; 5 tokens in 3 chunks and 3 tokens in 3 chunks.
TWO = [timing(10.0, [10.2, 10.3, 10.6], 5), timing(11.0, [11.1, 11.15, 11.2], 3, num_cached=60)]


def report(timings: Sequence[Timing], slo: Slo | None = None, lags_s: Sequence[float] = (), cpu: float = 0.1) -> Report:
    monitor = ClientMonitor()
    monitor.loop_lags_s, monitor.cpu_share = list(lags_s), cpu
    return make_report(RunInfo("http://there", "m", "2 at a time", 0, slo), timings, monitor)


@pytest.mark.parametrize("count", [1, 2, 7, 100, 1001])
def test_percentiles_are_numpys(count: int, seed: int) -> None:
    generator = random.Random(seed)
    values = [generator.expovariate(1.0) for _ in range(count)]
    for fraction in (0.0, 0.5, 0.9, 0.99, 1.0):
        assert percentile(values, fraction) == pytest.approx(float(np.percentile(values, fraction * 100)))
    found = Percentiles.of(values)
    assert found is not None
    assert (found.largest, found.mean) == (max(values), pytest.approx(float(np.mean(values))))


def test_no_values_have_no_percentiles() -> None:
    assert Percentiles.of([]) is None
    assert percentile([], 0.5) == 0.0


def test_figures_of_two_requests() -> None:
    found = report(TWO)
    assert (found.num_ok, found.num_failed) == (2, 0)
    assert found.duration_s == pytest.approx(1.2)
    assert found.requests_per_s == pytest.approx(2 / 1.2)
    assert found.output_tokens_per_s == pytest.approx(8 / 1.2)
    assert found.input_tokens_per_s == pytest.approx(200 / 1.2)
    assert (found.mean_output_tokens, found.cached_share) == (4, 0.3)
    assert found.tokens_per_chunk == pytest.approx(8 / 6)
    assert found.ttft_s and found.itl_s and found.token_s and found.e2e_s
    assert found.ttft_s.p50 == pytest.approx(0.15)
    assert found.itl_s.p50 == pytest.approx((0.05 + 0.1) / 2)
    assert found.token_s.mean == pytest.approx((0.4 / 4 + 0.1 / 2) / 2)
    assert found.e2e_s.largest == pytest.approx(0.6)


def test_failures_are_counted_by_message_and_not_measured() -> None:
    found = report([*TWO, failed("no"), failed("late"), failed("no")], Slo(e2e=10.0))
    assert (found.num_ok, found.num_failed, found.errors) == (2, 3, {"no": 2, "late": 1})
    assert found.e2e_s == report(TWO).e2e_s
    assert found.goodput and (found.goodput.num_good, found.goodput.share) == (2, 0.4)


def test_nothing_succeeded() -> None:
    found = report([failed("no")])
    assert (found.num_ok, found.ttft_s, found.output_tokens_per_s) == (0, None, 0)
    assert "–" in printed(found)


@pytest.mark.parametrize(
    ("bounds", "num_good"),
    [
        ("ttft=150ms", 1),
        ("ttft=0.25s", 2),
        ("itl=60ms", 1),
        ("max_itl=200ms", 1),
        ("e2e=0.7s", 2),
        ("ttft=1s,e2e=1ms", 0),
    ],
)
def test_goodput_counts_what_keeps_all_bounds(bounds: str, num_good: int) -> None:
    found = report(TWO, parse_slo(bounds)).goodput
    assert found is not None
    assert found.num_good == num_good
    assert found.requests_per_s == pytest.approx(num_good / 1.2)


def test_bounds_are_read_in_ms_and_s() -> None:
    assert parse_slo("ttft=500ms, itl=0.05s,max_itl=1s,e2e=2.5s") == Slo(0.5, 0.05, 1.0, 2.5)


@pytest.mark.parametrize("text", ["", "ttft", "ttft=5", "ttft=5m", "speed=5ms", "ttft=-1ms", "ttft=1ms,ttft=2ms"])
def test_bad_bounds_are_refused(text: str) -> None:
    with pytest.raises(InvalidOption, match="--slo"):
        parse_slo(text)


def test_one_token_meets_any_bound_between_tokens() -> None:
    assert Slo(itl=0.001, max_itl=0.001).is_met(timing(0.0, [0.5], 1))


@pytest.mark.parametrize(
    ("lags_s", "cpu", "is_bottleneck"),
    [([0.001] * 100, 0.2, False), ([0.001] * 90 + [0.05] * 10, 0.2, True), ([0.001] * 100, 0.95, True)],
)
def test_a_load_generator_that_does_not_keep_up_says_so(lags_s: list[float], cpu: float, is_bottleneck: bool) -> None:
    found = report(TWO, lags_s=lags_s, cpu=cpu)
    assert found.client.is_bottleneck is is_bottleneck
    assert ("WARNING" in printed(found)) is is_bottleneck


def test_without_usage_chunks_are_counted_and_it_is_said() -> None:
    stream = Timing(0.0, chunks_s=[0.1, 0.2])
    stream.finish(0.3)
    found = report([stream])
    assert (stream.num_output, found.has_usage) == (2, False)
    assert "did not count tokens" in printed(found)


def test_an_answer_without_text_came_when_it_ended() -> None:
    stream = Timing(1.0, num_output=4, is_counted=True)
    stream.finish(1.5)
    assert (stream.ttft_s, stream.total_s, stream.num_output) == (0.5, 0.5, 4)


def printed(found: Report) -> str:
    text = io.StringIO()
    print_report(found, Console(file=text, width=120, highlight=False, markup=False))
    return text.getvalue()


def test_the_table_says_all_figures() -> None:
    found = report([*TWO, failed("[red]no")], parse_slo("ttft=150ms"), lags_s=[0.002])
    text = printed(found)
    for part in ("2 ok, 1 failed", "100.0 in (30% cached), 4.0 out, 1.33 a chunk", "1 (33%) with ttft ≤ 150 ms"):
        assert part in text
    assert "failed 1×: [red]no" in text
    row = next(line for line in text.splitlines() if "time to first token" in line)
    assert "150" in row and "200" in row
    assert max(map(len, text.splitlines())) <= 120


def test_a_report_is_plain_json() -> None:
    found = report(TWO, Slo(ttft=0.15), lags_s=[0.001])
    assert json.loads(json.dumps(asdict(found)))["goodput"]["slo"]["ttft"] == 0.15


@pytest.mark.parametrize("timings", [TWO, [failed("no")], [timing(0.0, [0.5], 1)]])
def test_a_plot_is_one_file_that_loads_nothing(timings: list[Timing], tmp_path: Path) -> None:
    found = report(timings, Slo(ttft=0.3))
    for name in ("a.svg", "a.html"):
        write_plot(tmp_path / name, found, timings)
    drawing = (tmp_path / "a.svg").read_text()
    tree = ElementTree.fromstring(drawing)
    lines = tree.findall(".//{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 4
    page = (tmp_path / "a.html").read_text()
    assert drawing in page
    assert page.count("http") == 1  # the name space
    width, height = float(tree.attrib["width"]), float(tree.attrib["height"])
    for line in lines:
        for x, y in (point.split(",") for point in line.attrib["points"].split()):
            assert 0 <= float(x) <= width and 0 <= float(y) <= height
