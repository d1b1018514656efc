"""The figures of one run."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.bench.load import ClientMonitor
from cluster.bench.slo import Slo
from cluster.bench.timing import Percentiles, Timing, percentile

_BUSY_SHARE = 0.8
_LEAST_LAG_S = 0.010
_LAG_OF_TTFT = 0.1


@dataclass(frozen=True)
class Goodput:
    """``share``: of all requests, failed ones among them."""

    slo: Slo
    num_good: int
    share: float
    requests_per_s: float


@dataclass(frozen=True)
class Client:
    """The load generator. ``send_lag_s`` is None in a closed loop, where nothing is planned."""

    send_lag_s: Percentiles | None
    loop_lag_s: Percentiles | None
    cpu_share: float
    is_bottleneck: bool
    """It was busy, or so late that latencies hold a good part of its own delay."""


@dataclass(frozen=True)
class Report:
    """Of the requests that did not fail; times in seconds. None where there was nothing to measure.

    ``duration_s``: first sending to last end. ``itl_s``: all gaps between chunks, which hold ``tokens_per_chunk``
    tokens. ``token_s``: each request's mean time per token after the first.
    """

    target: str
    model: str
    load: str
    seed: int
    num_ok: int
    num_failed: int
    errors: dict[str, int]
    duration_s: float
    requests_per_s: float
    input_tokens_per_s: float
    output_tokens_per_s: float
    mean_input_tokens: float
    mean_output_tokens: float
    cached_share: float
    """Of the prompts' tokens, as far as the server tells."""
    tokens_per_chunk: float
    has_usage: bool
    """Whether the server counted the tokens; otherwise each chunk counts as one."""
    ttft_s: Percentiles | None
    itl_s: Percentiles | None
    token_s: Percentiles | None
    e2e_s: Percentiles | None
    goodput: Goodput | None
    client: Client


@dataclass(frozen=True)
class RunInfo:
    """What was run: for the report."""

    target: str
    model: str
    load: str
    seed: int
    slo: Slo | None = None
    is_planned: bool = False
    """Open loop."""


def make_report(info: RunInfo, timings: Sequence[Timing], monitor: ClientMonitor) -> Report:
    good = [timing for timing in timings if timing.error is None]
    failed = Counter(timing.error for timing in timings if timing.error is not None)
    duration_s = max((t.ended_s for t in timings), default=0.0) - min((t.sent_s for t in timings), default=0.0)
    per_s = 1 / duration_s if duration_s > 0 else 0.0
    num_input, num_output = sum(t.num_input for t in good), sum(t.num_output for t in good)
    num_chunks = sum(len(t.chunks_s) for t in good)
    ttft = [timing.ttft_s for timing in good]
    return Report(
        target=info.target,
        model=info.model,
        load=info.load,
        seed=info.seed,
        num_ok=len(good),
        num_failed=failed.total(),
        errors=dict(failed.most_common()),
        duration_s=duration_s,
        requests_per_s=len(good) * per_s,
        input_tokens_per_s=num_input * per_s,
        output_tokens_per_s=num_output * per_s,
        mean_input_tokens=num_input / max(len(good), 1),
        mean_output_tokens=num_output / max(len(good), 1),
        cached_share=sum(t.num_cached for t in good) / max(num_input, 1),
        tokens_per_chunk=num_output / max(num_chunks, 1),
        has_usage=all(timing.is_counted for timing in good),
        ttft_s=Percentiles.of(ttft),
        itl_s=Percentiles.of([gap for timing in good for gap in timing.gaps_s]),
        token_s=Percentiles.of([timing.token_s for timing in good if timing.token_s is not None]),
        e2e_s=Percentiles.of([timing.total_s for timing in good]),
        goodput=None if info.slo is None else _goodput(info.slo, good, len(timings), per_s),
        client=_client(info, timings, monitor, percentile(ttft, 0.5)),
    )


def _goodput(slo: Slo, good: Sequence[Timing], num_requests: int, per_s: float) -> Goodput:
    num_good = sum(slo.is_met(timing) for timing in good)
    return Goodput(slo, num_good, num_good / max(num_requests, 1), num_good * per_s)


def _client(info: RunInfo, timings: Sequence[Timing], monitor: ClientMonitor, ttft_p50_s: float) -> Client:
    send_lag = Percentiles.of([timing.lag_s for timing in timings]) if info.is_planned else None
    loop_lag = Percentiles.of(monitor.loop_lags_s)
    worst_s = max(lag.p99 if lag else 0.0 for lag in (send_lag, loop_lag))
    is_late = worst_s > max(_LEAST_LAG_S, _LAG_OF_TTFT * ttft_p50_s)
    return Client(send_lag, loop_lag, monitor.cpu_share, is_late or monitor.cpu_share > _BUSY_SHARE)
