"""``remuda bench``: how fast a server answers under a given load."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cluster.bench.lengths import parse_lengths
from cluster.bench.options import BenchOptions, parse_amount, read_token_ids
from cluster.bench.slo import parse_slo
from cluster.cli import options
from engine.errors import InvalidOption

EXAMPLES = (
    "Examples: remuda bench --concurrency 8 --prompt-len 128 --output-len 64 | remuda bench --rate 4 --duration 60 "
    "--prompt-len sharegpt --output-len sharegpt --slo ttft=500ms,itl=50ms | remuda bench --target 127.0.0.1:50051 "
    "--concurrency 8 --shared-prefix-len 768 --num-prefixes 4 --json"
)
_WIDTH = 120
_LENGTHS = "128, 64-256 (uniform), lognormal:MEDIAN,SIGMA[,MOST] or sharegpt."


def bench(
    target: Annotated[
        str, typer.Option(help="URL of an OpenAI-compatible server, or HOST:PORT of remuda's gRPC API.")
    ] = "http://127.0.0.1:8000",
    model: options.Model = "",
    chat: Annotated[bool, typer.Option("--chat", help="Chat completions in place of completions.")] = False,
    rate: Annotated[float | None, typer.Option(help="Requests a second, sent whatever comes back.")] = None,
    arrivals: Annotated[str, typer.Option(help="poisson or constant: the times of --rate.")] = "poisson",
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Clients, each with one request at a time. [1]")
    ] = None,
    num_requests: Annotated[int | None, typer.Option(min=1, help="How many requests. [100]")] = None,
    duration: Annotated[float | None, typer.Option(help="Or for how many seconds to send some.")] = None,
    prompt_len: Annotated[str, typer.Option(help=f"Tokens in: {_LENGTHS}")] = "128",
    output_len: Annotated[str, typer.Option(help=f"Tokens out: {_LENGTHS}")] = "64",
    shared_prefix_len: Annotated[int, typer.Option(min=0, help="Tokens that come before, shared by prompts.")] = 0,
    num_prefixes: Annotated[int, typer.Option(min=1, help="How many different ones.")] = 1,
    token_ids: Annotated[
        Path | None,
        typer.Option(help="JSON list of ids to draw prompts from. [words, as long as the server counts them]"),
    ] = None,
    seed: Annotated[int, typer.Option(help="The same load again.")] = 0,
    warm_up: Annotated[int, typer.Option(min=0, help="Requests before the measurement.")] = 2,
    slo: Annotated[
        str | None, typer.Option(help="Bounds of good answers: ttft, itl, max_itl, e2e, as in ttft=500ms.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Answers of full length; not every server knows it.")] = True,
    api_key_file: options.ApiKeyFile = None,
    plot: Annotated[Path | None, typer.Option(help="FILE.html or FILE.svg to draw to.")] = None,
    as_json: options.Json = False,
) -> None:
    """Put load on any OpenAI-compatible server, or on remuda's gRPC API, and report latency and throughput.

    Answers are greedy. Exit status 1 where no request succeeded.
    """
    if plot is not None and plot.suffix not in (".html", ".svg"):
        raise InvalidOption(f"--plot {plot}: write FILE.html or FILE.svg")
    if plot is not None and not plot.parent.is_dir():
        raise InvalidOption(f"--plot {plot}: there is no directory {plot.parent}")
    wanted = BenchOptions(
        target,
        model,
        chat,
        parse_amount(rate, arrivals, concurrency, num_requests, duration),
        parse_lengths("--prompt-len", prompt_len),
        parse_lengths("--output-len", output_len),
        shared_prefix_len,
        num_prefixes,
        read_token_ids(token_ids),
        seed,
        warm_up,
        parse_slo(slo) if slo else None,
        ignore_eos,
        options.read_api_key(api_key_file),
    )
    _run(wanted, plot, as_json)


def _run(wanted: BenchOptions, plot: Path | None, as_json: bool) -> None:
    import uvloop

    from cluster.bench.plot import write_plot
    from cluster.bench.run import run_bench
    from cluster.bench.table import print_report

    report, timings = uvloop.run(run_bench(wanted))
    if plot is not None:
        write_plot(plot, report, timings)
    if as_json:
        sys.stdout.write(json.dumps(asdict(report)) + "\n")
    else:
        print_report(report, Console(width=_WIDTH, highlight=False, markup=False))
    if not report.num_ok:
        raise typer.Exit(1)
