"""``remuda bench``: options to requests, requests to a report."""

import itertools
import random
from collections.abc import Iterator

from cluster.bench.arrivals import arrival_times
from cluster.bench.grpc_target import GrpcTarget
from cluster.bench.http_target import HttpTarget
from cluster.bench.load import ClientMonitor, closed_loop, open_loop
from cluster.bench.options import Amount, BenchOptions
from cluster.bench.prompts import PromptMaker, PromptText, TokenIds, Words
from cluster.bench.report import Report, RunInfo, make_report
from cluster.bench.target import LoadRequest, Target
from cluster.bench.timing import Timing
from engine.errors import InvalidOption

_CALIBRATION_WORDS = (32, 160)
_WARM_UP_CLIENTS = 8


async def run_bench(options: BenchOptions) -> tuple[Report, list[Timing]]:
    """Calibrate, warm up, put the load on and report.

    Raises InvalidOption, Unavailable, Unauthenticated or ServingError where the target cannot be used at all.
    """
    target = await _open(options)
    try:
        text = TokenIds(options.token_ids) if options.token_ids else await _calibrated(target)
        requests = _requests(options, text)
        await _warm_up(target, itertools.islice(requests, options.num_warm_up))
        async with ClientMonitor() as monitor:
            timings = await _load(target, options.amount, options.seed, requests)
    finally:
        await target.close()
    amount = options.amount
    is_planned = amount.rate is not None
    info = RunInfo(options.target, target.model, amount.words, options.seed, options.slo, is_planned)
    return make_report(info, timings, monitor), timings


async def _open(options: BenchOptions) -> Target:
    if "://" not in options.target:
        if options.chat:
            raise InvalidOption(f"--chat is of OpenAI's API: give --target http://…, not {options.target}")
        return await GrpcTarget.open(
            options.target, options.model, api_key=options.api_key, ignore_eos=options.ignore_eos
        )
    if options.chat and options.token_ids:
        raise InvalidOption("--token-ids: chats are text; leave out --chat or --token-ids")
    return await HttpTarget.open(
        options.target, options.model, chat=options.chat, api_key=options.api_key, ignore_eos=options.ignore_eos
    )


async def _calibrated(target: Target) -> Words:
    """How many tokens of this server a word is."""
    counts: list[tuple[int, int]] = []
    for num_words in _CALIBRATION_WORDS:
        timing = Timing()
        await target.run(LoadRequest(Words().draw(num_words, random.Random(num_words)), 1), timing)
        if not timing.is_counted:
            return Words()
        counts.append((num_words, timing.num_input))
    return Words.calibrated(counts)


def _requests(options: BenchOptions, text: PromptText) -> Iterator[LoadRequest]:
    """Without end; the same for the same seed (and calibration)."""
    generator = random.Random(f"requests {options.seed}")
    maker = PromptMaker(text, options.shared_prefix_len, options.num_prefixes, generator)
    while True:
        prompt = maker.prompt(options.prompt_len.draw(generator))
        yield LoadRequest(prompt, options.output_len.draw(generator))


async def _warm_up(target: Target, requests: Iterator[LoadRequest]) -> None:
    """The first answer must come; what fails later shows in the measurement."""
    if (first := next(requests, None)) is not None:
        await target.run(first, Timing())
        await closed_loop(target, requests, _WARM_UP_CLIENTS)


async def _load(target: Target, amount: Amount, seed: int, requests: Iterator[LoadRequest]) -> list[Timing]:
    """Requests of a known number are made before, so that their making does not delay the load."""
    if amount.rate is not None:
        arrivals = arrival_times(amount.arrivals, amount.rate, random.Random(f"arrivals {seed}"))
        planned = list(_first(arrivals, amount))
        return await open_loop(target, list(itertools.islice(requests, len(planned))), planned)
    assert amount.concurrency is not None
    if amount.num_requests is not None:
        requests = iter(list(itertools.islice(requests, amount.num_requests)))
    return await closed_loop(target, requests, amount.concurrency, amount.duration_s)


def _first(arrivals: Iterator[float], amount: Amount) -> Iterator[float]:
    if amount.duration_s is None:
        return itertools.islice(arrivals, amount.num_requests)
    duration_s = amount.duration_s
    return itertools.takewhile(lambda arrival_s: arrival_s < duration_s, arrivals)
