"""A report as a table for the terminal."""

from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from cluster.bench.report import Report
from cluster.bench.timing import Percentiles

_MAX_ERRORS = 3


def print_report(report: Report, console: Console) -> None:
    """The figures, then what must be known to read them."""
    console.print(f"{report.model} at {report.target}: {report.load}, seed {report.seed}")
    console.print(_figures(report))
    console.print(_latencies(report))
    for line in _notes(report):
        console.print(line)


def _figures(report: Report) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_row("requests", f"{report.num_ok} ok, {report.num_failed} failed in {report.duration_s:.1f} s")
    rates = f"{report.output_tokens_per_s:,.1f} tokens/s out, {report.input_tokens_per_s:,.1f} in"
    table.add_row("throughput", f"{report.requests_per_s:.2f} requests/s, {rates}")
    cached = f" ({report.cached_share:.0%} cached)" if report.cached_share else ""
    sizes = f"{report.mean_input_tokens:.1f} in{cached}, {report.mean_output_tokens:.1f} out"
    table.add_row("tokens a request", f"{sizes}, {report.tokens_per_chunk:.2f} a chunk")
    if report.goodput is not None:
        bounds = ", ".join(f"{name} ≤ {_ms(bound)} ms" for name, bound in asdict(report.goodput.slo).items() if bound)
        good = report.goodput
        table.add_row(
            "goodput", f"{good.requests_per_s:.2f} requests/s: {good.num_good} ({good.share:.0%}) with {bounds}"
        )
    return table


def _latencies(report: Report) -> Table:
    table = Table("ms", title_justify="left")
    for name in ("mean", "p50", "p90", "p99", "max"):
        table.add_column(name, justify="right")
    rows = {
        "time to first token": report.ttft_s,
        "between chunks": report.itl_s,
        "per token after the first": report.token_s,
        "whole answer": report.e2e_s,
    }
    for name, found in rows.items():
        table.add_row(name, *_row(found))
    return table


def _row(found: Percentiles | None) -> list[str]:
    if found is None:
        return ["–"] * 5
    return [_ms(value) for value in (found.mean, found.p50, found.p90, found.p99, found.largest)]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f}" if seconds < 0.1 else f"{seconds * 1e3:,.0f}"


def _notes(report: Report) -> list[str]:
    client = report.client
    lags = [f"its event loop {_ms(client.loop_lag_s.p99)} ms late (p99)"] if client.loop_lag_s else []
    lags += [f"requests sent {_ms(client.send_lag_s.p99)} ms late (p99)"] if client.send_lag_s else []
    notes = [f"load generator: {', '.join([*lags, f'{client.cpu_share:.0%} of a core'])}"]
    if client.is_bottleneck:
        notes.append("WARNING: the load generator did not keep up: latencies hold its own delay.")
        notes.append("Give it a free core, or put less load on the server.")
    if not report.has_usage:
        notes.append("WARNING: the server did not count tokens; every chunk counts as one.")
    for message, count in list(report.errors.items())[:_MAX_ERRORS]:
        notes.append(f"failed {count}×: {message}")
    return notes
