"""The engine on real checkpoints: scheduler, executor, ranks, model and sampler together, against transformers."""

import ipaddress
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from engine.config import Dtype, SchedulerConfig
from engine.engine import Engine
from engine.errors import CheckpointError, DoesNotFit, RankFailure
from engine.executor.in_process import InProcessExecutor
from engine.executor.process_gang import ProcessGang
from engine.executor.worker_config import WorkerConfig
from engine.messages import LoadProgress, Ready
from engine.model_config import ModelConfig, kv_groups
from engine.request import FinishReason, Output, Request, SamplingParams
from tests.parity.architectures import VOCAB_SIZE, make_reference
from tests.parity.reference import NUM_NEW, Reference
from tests.support.shared_memory import left_since, shared_memory_files

WAIT_S = 60.0


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The one variant for which a batch must say how long prompts are."""
    return make_reference("dynamic", tmp_path_factory.mktemp("dynamic"))


@pytest.fixture(scope="module")
def sliding(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_reference("mistral", tmp_path_factory.mktemp("sliding"))


def worker_config(directory: Path, **changes: Any) -> WorkerConfig:
    values = {
        "rank": 0,
        "channel_address": "",
        "secret": "",
        "model": str(directory),
        "dtype": Dtype.FLOAT32,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "block_size": 4,
        "kv_cache_memory_bytes": 2**20,
    }
    return WorkerConfig(**values | changes)


class Served:
    """An engine on its executor."""

    def __init__(self, executor: InProcessExecutor | ProcessGang, config: WorkerConfig) -> None:
        self.executor = executor
        model = ModelConfig.from_directory(config.model)
        self.engine = Engine(
            executor=executor,
            kv_groups=kv_groups(model),
            vocab_size=model.vocab_size,
            scheduler_config=SchedulerConfig(
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_model_len=executor.ready.max_model_len,
                depth=config.depth,
            ),
            cache_config=executor.ready.cache,
        )

    def run(self, requests: list[Request]) -> dict[str, list[Output]]:
        outputs: dict[str, list[Output]] = {request.request_id: [] for request in requests}
        for request in requests:
            self.engine.add(request)
        while self.engine.has_work:
            for output in self.engine.step():
                outputs[output.request_id].append(output)
            self.engine.check_integrity()
        for found in outputs.values():
            assert [output.finish_reason is not None for output in found] == [False] * (len(found) - 1) + [True]
        assert self.engine.stats().num_blocks_used == 0
        return outputs

    def tokens(self, requests: list[Request]) -> dict[str, list[int]]:
        return {name: joined(outputs) for name, outputs in self.run(requests).items()}


def joined(outputs: list[Output]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


Serve = Callable[..., Served]


@pytest.fixture
def serve() -> Iterator[Serve]:
    started: list[Served] = []

    def start(reference: Reference, **changes: Any) -> Served:
        config = worker_config(reference.directory, **changes)
        started.append(Served(InProcessExecutor(config), config))
        return started[-1]

    yield start
    for served in started:
        served.executor.close()


def make_request(name: str, prompt: list[int], **options: Any) -> Request:
    values: dict[str, Any] = {"max_tokens": NUM_NEW, "temperature": 0.0}
    return Request(name, list(prompt), len(prompt), SamplingParams(**values | options))


def greedy(reference: Reference, **options: Any) -> list[Request]:
    return [make_request(f"r{i}", prompt, **options) for i, prompt in enumerate(reference.prompts)]


def expected_tokens(reference: Reference) -> dict[str, list[int]]:
    return {f"r{i}": found.token_ids[-NUM_NEW:] for i, found in enumerate(reference.generated)}


SAMPLED: list[dict[str, Any]] = [
    {"temperature": 1.0, "seed": 7},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 8, "repetition_penalty": 1.2},
    {"temperature": 1.2, "min_p": 0.02, "seed": -9, "frequency_penalty": 0.5, "presence_penalty": 0.3},
    {"temperature": 0.0, "logit_bias": {5: 3.0}},
]


def sampled(reference: Reference) -> list[Request]:
    return [
        make_request(f"s{i}-{j}", prompt, **options)
        for i, prompt in enumerate(reference.prompts)
        for j, options in enumerate(SAMPLED)
    ]


@pytest.mark.parametrize("name", ["dense", "mixture", "dynamic", "sliding"])
@pytest.mark.parametrize("limits", [{}, {"max_num_batched_tokens": 8, "max_num_seqs": 3}], ids=["whole", "chunked"])
def test_greedy_tokens_are_those_of_transformers(
    request: pytest.FixtureRequest, serve: Serve, name: str, limits: dict[str, int]
) -> None:
    reference: Reference = request.getfixturevalue(name)
    assert serve(reference, **limits).tokens(greedy(reference)) == expected_tokens(reference)


def test_two_processes_with_plans_in_flight_compute_the_same(mixture: Reference, serve: Serve) -> None:
    messages: list[object] = []
    config = worker_config(mixture.directory, tp=2, ep=2, depth=2)
    gang = ProcessGang(config, on_message=messages.append)
    try:
        assert [hello.rank for hello in gang.ready.ranks] == [0, 1]
        assert {hello.pid for hello in gang.ready.ranks} == {process.pid for process in gang.processes}
        assert {"import", "rendezvous", "load", "profile", "warm_up"} == set(gang.ready.phase_seconds)
        loaded = {m.rank: m for m in messages if isinstance(m, LoadProgress) and m.num_bytes_total}
        # What is read; a rank also holds the rows that pad its part of the vocabulary.
        assert all(m.num_bytes_done == m.num_bytes_total <= gang.ready.weight_bytes[r] for r, m in loaded.items())
        assert sorted(loaded) == [0, 1] and sum(isinstance(m, Ready) for m in messages) == 2
        assert not _listens_beyond_loopback(gang)
        served = Served(gang, config)
        assert served.tokens(greedy(mixture)) == expected_tokens(mixture)
        assert served.tokens(sampled(mixture)) == serve(mixture).tokens(sampled(mixture))
    finally:
        gang.close()
    assert [process.returncode for process in gang.processes] == [0, 0]


def _listens_beyond_loopback(gang: ProcessGang) -> list[str]:
    processes = [psutil.Process(), *(psutil.Process(process.pid) for process in gang.processes)]
    return [
        connection.laddr.ip
        for process in processes
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and not _is_loopback(connection.laddr.ip)
    ]


def _is_loopback(address: str) -> bool:
    """Written as IPv6 too, as gRPC's sockets are."""
    parsed = ipaddress.ip_address(address)
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return (mapped or parsed).is_loopback


def test_a_sampled_stream_depends_on_nothing_but_its_request(mixture: Reference, serve: Serve) -> None:
    """Not on its batch, on chunks, nor on plans in flight."""
    requests = sampled(mixture)
    together = serve(mixture).tokens(requests)
    alone = serve(mixture)
    assert {name: tokens for r in requests[::3] for name, tokens in alone.tokens([r]).items()} == {
        r.request_id: together[r.request_id] for r in requests[::3]
    }
    assert serve(mixture, max_num_batched_tokens=8, max_num_seqs=5, depth=2).tokens(requests) == together
    assert serve(mixture, depth=3).tokens(requests) == together


def test_a_stream_resumes_where_it_was_cut(dense: Reference, serve: Serve) -> None:
    requests = sampled(dense)
    whole = serve(dense).tokens(requests)
    cut = 5
    resumed = [
        Request(r.request_id, r.token_ids + whole[r.request_id][:cut], r.num_prompt_tokens, r.sampling)
        for r in requests
    ]
    assert serve(dense).tokens(resumed) == {name: tokens[cut:] for name, tokens in whole.items()}


def test_choices_of_one_seed_differ_and_repeat(dense: Reference, serve: Serve) -> None:
    prompt = dense.prompts[0]
    requests = [make_request(f"c{c}", prompt, temperature=1.5, seed=3, choice=c) for c in range(4)]
    first = serve(dense).tokens(requests)
    assert len({tuple(tokens) for tokens in first.values()}) == 4
    assert serve(dense).tokens(requests[::-1]) == first


def test_preempted_requests_lose_nothing(dense: Reference, serve: Serve) -> None:
    """So few blocks that requests must be computed again and again."""
    roomy = serve(dense)
    requests = sampled(dense)
    expected = roomy.tokens(requests)
    block_bytes = 2**20 // roomy.executor.ready.cache.num_blocks
    tight = serve(dense, kv_cache_memory_bytes=24 * block_bytes, depth=2)
    assert tight.executor.ready.cache.num_blocks == 24
    assert tight.tokens(requests) == expected
    assert tight.engine.stats().num_preemptions > 0


def test_a_window_serves_texts_longer_than_the_cache(sliding: Reference, serve: Serve) -> None:
    """A window of 8 positions sees 3 blocks of 4 at most, of 5 that there are; prompts have up to 38."""
    block_bytes = 2**20 // serve(sliding).executor.ready.cache.num_blocks
    tight = serve(sliding, kv_cache_memory_bytes=6 * block_bytes, depth=2)
    assert tight.executor.ready.cache.num_blocks == 6
    assert tight.tokens(greedy(sliding)) == expected_tokens(sliding)


def test_abort_gives_all_blocks_back(mixture: Reference, serve: Serve) -> None:
    served = serve(mixture, max_num_batched_tokens=16, depth=2)
    for request in greedy(mixture):
        served.engine.add(request)
    ended: dict[str, list[FinishReason]] = {}
    for step in range(100):
        if step == 3:
            assert served.engine.abort("r2") and served.engine.abort("r0")
            assert not served.engine.abort("r2")
        for output in served.engine.step():
            if output.finish_reason is not None:
                ended.setdefault(output.request_id, []).append(output.finish_reason)
        if not served.engine.has_work:
            break
    assert ended == {"r0": [FinishReason.ABORT], "r2": [FinishReason.ABORT], "r1": [FinishReason.LENGTH]}
    assert served.engine.stats().num_blocks_used == 0


def test_stop_tokens_and_min_tokens(dense: Reference, serve: Serve) -> None:
    expected = dense.generated[0].token_ids[-NUM_NEW:]
    stop = expected[3]
    prompt = dense.prompts[0]
    outputs = serve(dense).run(
        [
            make_request("stops", prompt, stop_token_ids=(stop,)),
            make_request("waits", prompt, stop_token_ids=(stop,), min_tokens=NUM_NEW - 1),
        ]
    )
    assert joined(outputs["stops"]) == expected[: expected.index(stop) + 1]
    last = outputs["stops"][-1]
    assert (last.finish_reason, last.stop_token_id) == (FinishReason.STOP, stop)
    waited = joined(outputs["waits"])
    assert len(waited) == NUM_NEW and stop not in waited[:-1]
    assert waited[: expected.index(stop)] == expected[: expected.index(stop)]


@pytest.mark.parametrize("limits", [{}, {"max_num_batched_tokens": 8}], ids=["whole", "chunked"])
def test_logprobs_are_those_of_transformers(dense: Reference, serve: Serve, limits: dict[str, int]) -> None:
    outputs = serve(dense, **limits).run(greedy(dense, logprobs=3, prompt_logprobs=2))
    for i, (prompt, generated) in enumerate(zip(dense.prompts, dense.generated, strict=True)):
        logits = generated.logits.astype(np.float64)
        expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        found = [entry for output in outputs[f"r{i}"] for entry in output.logprobs or []]
        assert len(found) == NUM_NEW
        for step, entry in enumerate(found):
            row = expected[len(prompt) - 1 + step]
            assert entry.rank == 1 and entry.token_ids == np.argsort(-row)[:3].tolist()
            assert entry.logprobs == pytest.approx(np.sort(row)[::-1][:3].tolist(), abs=1e-4)
        prompt_entries = [entry for output in outputs[f"r{i}"] for entry in output.prompt_logprobs or []]
        assert len(prompt_entries) == len(prompt) and prompt_entries[0] is None
        for position, prompt_entry in enumerate(prompt_entries[1:], 1):
            row = expected[position - 1]
            assert prompt_entry is not None
            assert prompt_entry.logprob == pytest.approx(row[prompt[position]], abs=1e-4)
            assert prompt_entry.rank == 1 + (row > row[prompt[position]]).sum()
            assert prompt_entry.token_ids == np.argsort(-row)[:2].tolist()


def test_the_longest_context_that_fits_is_served(dense: Reference, serve: Serve) -> None:
    block_bytes = 2**20 // serve(dense).executor.ready.cache.num_blocks
    served = serve(dense, kv_cache_memory_bytes=11 * block_bytes)
    # Ten blocks of four tokens can be handed out, and a request's last token is never computed.
    assert served.executor.ready.max_model_len == 41
    prompt = [i % VOCAB_SIZE for i in range(30)]
    assert len(served.tokens([make_request("long", prompt, max_tokens=11)])["long"]) == 11
    with pytest.raises(DoesNotFit, match="--max-model-len to at most 41"):
        InProcessExecutor(worker_config(dense.directory, kv_cache_memory_bytes=11 * block_bytes), max_model_len=42)


def test_kill_9_of_a_rank_is_named_and_leaves_nothing(mixture: Reference) -> None:
    before = shared_memory_files()
    config = worker_config(mixture.directory, tp=2)
    gang = ProcessGang(config)
    try:
        served = Served(gang, config)
        for request in greedy(mixture, max_tokens=200):
            served.engine.add(request)
        served.engine.step()
        os.kill(gang.processes[1].pid, signal.SIGKILL)
        killed_at = time.monotonic()
        with pytest.raises(RankFailure, match="rank 1") as failure:
            while True:
                served.engine.step()
        assert failure.value.rank == 1
        assert time.monotonic() - killed_at < 5.0
    finally:
        gang.close()
    assert [process.returncode is not None for process in gang.processes] == [True, True]
    assert not left_since(before)


def test_a_broken_checkpoint_ends_the_start_with_its_own_error(dense: Reference, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((dense.directory / "config.json").read_bytes())
    with pytest.raises(CheckpointError):
        InProcessExecutor(worker_config(tmp_path))
    before = psutil.Process().children()
    with pytest.raises(CheckpointError, match="rank 0"):
        ProcessGang(worker_config(tmp_path))
    assert psutil.Process().children() == before
