"""remuda-tiny served by the engine as users have it, once on the device in question and once on the CPU: executor,
scheduler, ranks and all, in cases that between them take every path of a rank.

Each run has chunked prompts, a common prefix that is found again, too few blocks, penalties and biases, draws, and as
many plans in flight as it may; a run in which one of these did not happen is an error, not a pass.
"""

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import engine
from bench.random_adapter import write_random_adapter
from engine.config import CacheConfig, Determinism, Dtype, LoraConfig, ParallelConfig, SchedulerConfig
from engine.engine import Engine
from engine.executor.channel_executor import ChannelExecutor
from engine.executor.in_process import InProcessExecutor
from engine.executor.process_gang import ProcessGang
from engine.executor.worker_config import WorkerConfig
from engine.model_config import ModelConfig, kv_groups
from engine.request import (
    MAX_LOGPROBS,
    FinishReason,
    Grammar,
    GrammarKind,
    Output,
    Pooling,
    Request,
    SamplingParams,
    TopLogprobs,
)

TINY = Path(engine.__path__[0]) / "assets" / "remuda-tiny"
DEPTHS = (1, 2)
"""Plans in flight."""
_NUM_NEW = 24
_MAX_NUM_SEQS = 6
_NUM_BLOCKS = 48
"""Too few for so many requests at once, enough for any one of them."""
_MAX_NUM_BATCHED_TOKENS = 48
_END_IDS = (2033, 2036)
_SHARED = list(range(300, 340))
"""Two blocks and a half with which prompts begin."""
_PROMPTS = [
    [*_SHARED, *range(5, 165)],
    [*_SHARED, 7, 9],
    [*_SHARED, *range(900, 933)],
    [11, 12, 13],
    list(range(40, 90)),
]
"""The longest crosses the border of an attention chunk, and of several steps."""


@dataclass(frozen=True)
class Case:
    """One way to serve.

    ``bound``: what ``difference`` may come to. In float32 what differs is the order of sums (1e-5 on a CPU). bfloat16
    knows a number to three digits, which comes to 0.2 to 0.4 nats on a CPU; the bound then finds gross errors alone.
    """

    name: str
    dtype: Dtype = Dtype.FLOAT32
    quantization: str | None = None
    is_deterministic: bool = False
    has_adapter: bool = False
    has_grammar: bool = False
    has_embeddings: bool = False
    bound: float = 0.05


CASES = (
    Case("plain"),
    *(Case(form, quantization=form) for form in ("int8", "int4", "fp8")),
    Case("plain, bfloat16", Dtype.BFLOAT16, bound=1.0),
    *(Case(f"{form}, bfloat16", Dtype.BFLOAT16, form, bound=1.0) for form in ("int8", "int4", "fp8")),
    Case("deterministic", is_deterministic=True),
    Case("LoRA", has_adapter=True),
    Case("grammar", has_grammar=True),
    Case("embeddings", has_embeddings=True),
)
GANGS = (ParallelConfig(tp=2), ParallelConfig(pp=2), ParallelConfig(dp=2, ep=2))


@dataclass
class Served:
    """What came of one run, by request: tokens, their log-probabilities where they were asked for, or an embedding
    [hidden_size] float32. The numbers say what happened on the way."""

    tokens: dict[str, list[int]] = field(default_factory=dict)
    logprobs: dict[str, list[TopLogprobs]] = field(default_factory=dict)
    vectors: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    num_preemptions: int = 0
    num_cached_tokens: int = 0
    most_in_flight: int = 0

    def take(self, outputs: Iterable[Output]) -> None:
        """Raises RuntimeError where a request ended in an error."""
        for output in outputs:
            if output.finish_reason is FinishReason.ERROR:
                raise RuntimeError(f"request {output.request_id} ended: {output.error}")
            self.tokens[output.request_id] += output.token_ids
            self.logprobs[output.request_id] += output.logprobs or []
            self.num_cached_tokens += output.num_cached_tokens
            if output.pooled is not None:
                self.vectors[output.request_id] = np.frombuffer(output.pooled, "<f4")

    def require(self, depth: int) -> None:
        """Raises RuntimeError where the run was too easy to show anything."""
        missing = [
            what
            for what, happened in {
                "a preemption": self.num_preemptions > 0,
                "a prefix hit": self.num_cached_tokens > 0,
                f"{depth} plans in flight": self.most_in_flight == depth,
            }.items()
            if not happened
        ]
        if missing:
            raise RuntimeError(f"the run had no {' and no '.join(missing)}: it shows nothing of it")


def check_served(case: Case, depth: int, device: str) -> tuple[float, float]:
    """``device`` ("cuda" or "cpu") against the CPU: the error, and what it may be. Raises RuntimeError where a request
    failed, or what was to be shown did not happen."""
    found = serve(case, depth, device)
    found.require(depth)
    if case.is_deterministic:
        require_same_alone(found)
    return difference(found, expected_of(case)), case.bound


def check_gang(layout: ParallelConfig, device: str) -> tuple[float, float]:
    """The same with ranks in processes of their own (on "cuda": one GPU each), against one rank of the CPU."""
    case = CASES[0]
    found = serve(case, 2, device, layout)
    return difference(found, expected_of(case)), case.bound


@cache
def expected_of(case: Case) -> Served:
    """By one rank of the CPU in float32, one plan after the other, with everybody's log-probabilities."""
    return serve(replace(case, dtype=Dtype.FLOAT32), 1, "cpu", wants_all_logprobs=True)


def difference(found: Served, expected: Served) -> float:
    """The largest of: how far apart the log-probabilities of a token are (nats); how much less likely than its own
    choice ``expected`` held the first token that differs (what follows has another past, and is not compared); how far
    apart two elements of a vector are. Infinite where a token was out of the question, or one is missing."""
    worst = 0.0
    for name, tokens in expected.tokens.items():
        worst = max(worst, _difference_of_tokens(found, expected, name))
        if not tokens:
            worst = max(worst, float(np.abs(found.vectors[name] - expected.vectors[name]).max()))
    return worst


def _difference_of_tokens(found: Served, expected: Served, name: str) -> float:
    mine, theirs = found.tokens[name], expected.tokens[name]
    worst = 0.0
    for index, (token_id, other) in enumerate(zip(mine, theirs, strict=False)):
        at = expected.logprobs[name][index]
        if token_id != other:
            likely = dict(zip(at.token_ids, at.logprobs, strict=True))
            return max(worst, at.logprob - likely.get(token_id, -np.inf))
        if found.logprobs[name]:
            worst = max(worst, abs(found.logprobs[name][index].logprob - at.logprob))
    return worst if len(mine) == len(theirs) else np.inf


def require_same_alone(served: Served) -> None:
    """Raises RuntimeError where a request's tokens depended on its company."""
    for name, tokens in served.tokens.items():
        if name.startswith("alone ") and tokens != served.tokens[name.replace("alone", "busy")]:
            raise RuntimeError(f"deterministic, but {name} it has other tokens than in company")


def serve(
    case: Case, depth: int, device: str, layout: ParallelConfig = ParallelConfig(), *, wants_all_logprobs: bool = False
) -> Served:
    """All requests of a case, in an engine of their own. Raises RuntimeError where one failed."""
    model = ModelConfig.from_directory(TINY, case.quantization)
    config = WorkerConfig(
        rank=0,
        channel_address="",
        secret="",
        model=str(TINY),
        device=device,
        dtype=case.dtype,
        quantization=case.quantization,
        determinism=Determinism.D1 if case.is_deterministic else Determinism.OFF,
        depth=depth,
        tp=layout.tp,
        pp=layout.pp,
        dp=layout.dp,
        ep=layout.ep,
        kv_cache_memory_bytes=16 * 2**20,
        gpu_memory_utilization=0.25,
        max_num_seqs=_MAX_NUM_SEQS,
        max_num_batched_tokens=_MAX_NUM_BATCHED_TOKENS,
        block_size=16,
    )
    executor: ChannelExecutor = InProcessExecutor(config) if layout.num_ranks == 1 else ProcessGang(config)
    try:
        assert isinstance(executor, InProcessExecutor | ProcessGang)
        ready = executor.ready
        engine = Engine(
            executor=executor,
            kv_groups=kv_groups(model, layout.pp),
            num_dp_groups=layout.dp,
            vocab_size=model.vocab_size,
            scheduler_config=SchedulerConfig(_MAX_NUM_SEQS, _MAX_NUM_BATCHED_TOKENS, ready.max_model_len, depth=depth),
            cache_config=CacheConfig(ready.cache.block_size, min(_NUM_BLOCKS, ready.cache.num_blocks)),
            lora_config=LoraConfig(max_loras=1),
            input_references=layout.pp == 1,
        )
        return _run(engine, case, wants_all_logprobs)
    finally:
        executor.close()


def _run(engine: Engine, case: Case, wants_all_logprobs: bool) -> Served:
    """Everything at once; the same once more without anything that the host must see; and, where that may not matter,
    each alone."""
    served = Served()
    if case.has_adapter:
        _load_adapter(engine, served)
    _serve_all(engine, served, _requests(case, "first", wants_all_logprobs, is_bare=False))
    _serve_all(engine, served, _requests(case, "busy", wants_all_logprobs, is_bare=True))
    if case.is_deterministic:
        for request in _requests(case, "alone", wants_all_logprobs, is_bare=True):
            _serve_all(engine, served, [request])
    served.num_preemptions = engine.stats().num_preemptions
    return served


def _load_adapter(engine: Engine, served: Served) -> None:
    with tempfile.TemporaryDirectory() as name:
        write_random_adapter(Path(name))
        loaded = engine.load_adapter("adapter", name)
        while not loaded.done():
            served.take(engine.step())
        loaded.result()


def _serve_all(engine: Engine, served: Served, requests: list[Request]) -> None:
    """One more comes with every second step, so that prompts, their chunks and decoding meet in all ways."""
    waiting, num_steps = list(requests), 0
    while waiting or engine.has_work:
        if waiting and num_steps % 2 == 0:
            request = waiting.pop(0)
            served.tokens[request.request_id], served.logprobs[request.request_id] = [], []
            engine.add(request)
        served.take(engine.step())
        served.most_in_flight = max(served.most_in_flight, engine.stats().num_in_flight)
        engine.check_integrity()
        num_steps += 1


def _requests(case: Case, name: str, wants_all_logprobs: bool, *, is_bare: bool) -> list[Request]:
    """``is_bare``: without log-probabilities, penalties and grammars, with which a rank does not read every token
    before the next step."""
    options: list[dict[str, Any]] = [{} for _ in _PROMPTS]
    # Draws whose outcome is certain: the whole way of a draw, and no border that a last bit could move a number over.
    options[1] = {"temperature": 0.8, "top_k": 1, "top_p": 0.9, "min_p": 0.01, "seed": 7}
    if not is_bare:
        options[2] = {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": 0.2, "logprobs": 2}
        options[3] = {"logit_bias": {50: 2.0, 60: -5.0}, "min_tokens": 4, "stop_token_ids": _END_IDS}
        options[4] = {"logprobs": 0, "prompt_logprobs": 1}
        if case.has_grammar:
            options[3] = {"grammar": Grammar(GrammarKind.REGEX, "[a-z]{3,9} [0-9]{3}"), "stop_token_ids": _END_IDS}
            options[0] = {
                "grammar": Grammar(GrammarKind.REGEX, "(yes|no|perhaps), .{2,30}"),
                "stop_token_ids": _END_IDS,
            }
    if wants_all_logprobs:
        options = [each | {"logprobs": MAX_LOGPROBS} for each in options]
    adapters = ["", "adapter", "", "adapter", ""] if case.has_adapter else [""] * len(_PROMPTS)
    requests = []
    for number, (prompt, each, adapter) in enumerate(zip(_PROMPTS, options, adapters, strict=True)):
        sampling = SamplingParams(**{"max_tokens": _NUM_NEW, "temperature": 0.0} | each)
        requests.append(Request(f"{name} {number}", prompt, len(prompt), sampling, adapter=adapter))
    if case.is_deterministic and not wants_all_logprobs:
        # Compared with itself alone: on another device a last bit may choose another token.
        sampling = SamplingParams(_NUM_NEW, seed=7, temperature=0.8, top_p=0.9)
        requests.append(Request(f"{name} drawn", _PROMPTS[2], len(_PROMPTS[2]), sampling))
    if case.has_embeddings:
        for pooling in Pooling:
            sampling = SamplingParams(0, pooling=pooling)
            requests.insert(2, Request(f"{name} {pooling}", _PROMPTS[2], len(_PROMPTS[2]), sampling))
    return requests
