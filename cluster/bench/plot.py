"""A report drawn: distributions of the latencies, and tokens a second over the run. Plain SVG, or HTML around it."""

import html
import math
from collections.abc import Sequence
from pathlib import Path

from cluster.bench.report import Report
from cluster.bench.timing import Timing

_PANEL_WIDTH, _PANEL_HEIGHT = 460, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 16, 34, 38
_MAX_POINTS = 400
_NUM_BUCKETS = 60
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#333}.title{font-weight:600}.head{font-size:14px}"
    ".axis{stroke:#888;stroke-width:1}.grid{stroke:#ddd;stroke-width:1}.line{fill:none;stroke:#1665c0;stroke-width:2}"
    ".bound{stroke:#c62828;stroke-width:1.5;stroke-dasharray:5 4}"
)

Point = tuple[float, float]


def write_plot(path: Path, report: Report, timings: Sequence[Timing]) -> None:
    """``path``: .svg or .html. One file that loads nothing else."""
    drawing = draw(report, timings)
    if path.suffix == ".html":
        title = html.escape(f"remuda bench: {report.model}")
        drawing = f'<!doctype html>\n<meta charset="utf-8">\n<title>{title}</title>\n{drawing}'
    path.write_text(drawing, encoding="utf-8")


def draw(report: Report, timings: Sequence[Timing]) -> str:
    """The SVG element. Of the requests that did not fail."""
    good = [timing for timing in timings if timing.error is None]
    slo = report.goodput.slo if report.goodput else None
    gaps = [gap for timing in good for gap in timing.gaps_s]
    panels = [
        _cdf("time to first token", [timing.ttft_s for timing in good], slo.ttft if slo else None),
        _cdf("between chunks", gaps, slo.max_itl if slo else None),
        _cdf("whole answer", [timing.total_s for timing in good], slo.e2e if slo else None),
        _panel("tokens out a second", "s since the start", _rates(good), None),
    ]
    head = f"{report.model}: {report.load}, {report.num_ok} ok, {report.num_failed} failed, "
    head += f"{report.output_tokens_per_s:,.1f} tokens/s"
    width, height = 2 * _PANEL_WIDTH, 2 * _PANEL_HEIGHT + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        f'<style>{_STYLE}</style><rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text class="title head" x="{_LEFT}" y="22">{html.escape(head)}</text>',
    ]
    for index, panel in enumerate(panels):
        x, y = index % 2 * _PANEL_WIDTH, index // 2 * _PANEL_HEIGHT + 30
        parts.append(f'<g transform="translate({x} {y})">{panel}</g>')
    return "\n".join([*parts, "</svg>\n"])


def _cdf(title: str, values_s: Sequence[float], bound_s: float | None) -> str:
    """Share of values (%) up to each, in ms."""
    ordered = sorted(values_s)
    step = max(len(ordered) // _MAX_POINTS, 1)
    ranks = [*range(0, len(ordered), step), len(ordered) - 1] if ordered else []
    points = [(ordered[rank] * 1e3, (rank + 1) / len(ordered) * 100) for rank in ranks]
    return _panel(f"{title}: % up to …", "ms", points, None if bound_s is None else bound_s * 1e3)


def _rates(timings: Sequence[Timing]) -> list[Point]:
    """A chunk counts as many tokens as the request's chunks hold on average."""
    began_s = min((timing.sent_s for timing in timings), default=0.0)
    ended_s = max((timing.ended_s for timing in timings), default=0.0)
    width_s = (ended_s - began_s) / _NUM_BUCKETS
    if width_s <= 0:
        return []
    buckets = [0.0] * _NUM_BUCKETS
    for timing in timings:
        for chunk_s in timing.chunks_s:
            index = min(int((chunk_s - began_s) / width_s), _NUM_BUCKETS - 1)
            buckets[index] += timing.num_output / len(timing.chunks_s)
    return [((index + 0.5) * width_s, tokens / width_s) for index, tokens in enumerate(buckets)]


def _panel(title: str, unit: str, points: Sequence[Point], bound: float | None) -> str:
    """A line with axes from 0; ``bound`` is a vertical line."""
    most_x = max([x for x, _ in points] + ([bound] if bound else []), default=1.0) or 1.0
    most_y = max((y for _, y in points), default=1.0) or 1.0
    width, height = _PANEL_WIDTH - _LEFT - _RIGHT, _PANEL_HEIGHT - _TOP - _BOTTOM

    def place(x: float, y: float) -> Point:
        return round(_LEFT + x / most_x * width, 1), round(_TOP + height - y / most_y * height, 1)

    parts = [f'<text class="title" x="{_LEFT}" y="{_TOP - 12}">{html.escape(title)}</text>']
    for tick in _ticks(most_y):
        x, y = place(0, tick)
        parts.append(f'<line class="grid" x1="{x}" y1="{y}" x2="{x + width}" y2="{y}"/>')
        parts.append(f'<text x="{x - 6}" y="{y + 4}" text-anchor="end">{tick:,.6g}</text>')
    for tick in _ticks(most_x):
        x, y = place(tick, 0)
        parts.append(f'<line class="axis" x1="{x}" y1="{y}" x2="{x}" y2="{y + 4}"/>')
        parts.append(f'<text x="{x}" y="{y + 17}" text-anchor="middle">{tick:,.6g}</text>')
    x, y = place(0, 0)
    parts.append(f'<line class="axis" x1="{x}" y1="{y}" x2="{x + width}" y2="{y}"/>')
    parts.append(f'<text x="{x + width}" y="{y + 32}" text-anchor="end">{html.escape(unit)}</text>')
    if bound is not None:
        x, y = place(bound, 0)
        parts.append(f'<line class="bound" x1="{x}" y1="{_TOP}" x2="{x}" y2="{y}"/>')
    line = " ".join(f"{x},{y}" for x, y in (place(*point) for point in points))
    return "".join([*parts, f'<polyline class="line" points="{line}"/>'])


def _ticks(most: float) -> list[float]:
    """Up to six round numbers from 0."""
    rough = most / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [index * step for index in range(int(most / step + 1e-9) + 1)]
