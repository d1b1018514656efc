"""An engine on a real gang of processes, and requests for it."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from engine.config import Dtype, SchedulerConfig
from engine.engine import Engine
from engine.errors import RankFailure
from engine.executor.executor import Executor
from engine.executor.gang_start import GangReady
from engine.executor.process_gang import ProcessGang
from engine.executor.worker_config import WorkerConfig
from engine.model_config import ModelConfig, kv_groups
from engine.request import Output, Request, SamplingParams
from tests.parity.reference import NUM_NEW, Reference


class GangEngine:
    """An engine on a gang that is ready."""

    def __init__(self, executor: Executor, ready: GangReady, config: WorkerConfig) -> None:
        model = ModelConfig.from_directory(config.model)
        self.engine = Engine(
            executor=executor,
            kv_groups=kv_groups(model, config.pp),
            num_dp_groups=config.dp,
            vocab_size=model.vocab_size,
            scheduler_config=SchedulerConfig(
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_model_len=ready.max_model_len,
                depth=config.depth,
            ),
            cache_config=ready.cache,
            input_references=config.pp == 1,
        )
        self.most_in_flight = 0

    def run(self, requests: list[Request]) -> dict[str, list[Output]]:
        outputs: dict[str, list[Output]] = {request.request_id: [] for request in requests}
        for request in requests:
            self.engine.add(request)
        while self.engine.has_work:
            for output in self.engine.step():
                outputs[output.request_id].append(output)
            self.most_in_flight = max(self.most_in_flight, self.engine.stats().num_in_flight)
            self.engine.check_integrity()
        assert self.engine.stats().num_blocks_used == 0
        return outputs


class ForkedGangEngine(GangEngine):
    """On a gang of this process's own, on this host."""

    def __init__(self, gang: ProcessGang, config: WorkerConfig) -> None:
        super().__init__(gang, gang.ready, config)
        self.gang = gang
        self.epoch = config.epoch

    def reform(self) -> None:
        """After a failure: new ranks for those that are gone, the others under a new epoch."""
        self.gang = self.gang.reform()
        self.epoch += 1
        self.engine.reset(self.epoch, executor=self.gang, cache_config=self.gang.ready.cache)

    def run_with_kills(self, requests: list[Request], victims: dict[int, int]) -> dict[str, list[int]]:
        """The tokens of each request. ``victims``: after so many steps (over all epochs) this rank is killed."""
        victims = dict(victims)
        outputs: dict[str, list[Output]] = {request.request_id: [] for request in requests}
        for request in requests:
            self.engine.add(request)
        num_steps = 0
        while self.engine.has_work:
            try:
                for output in self.engine.step():
                    outputs[output.request_id].append(output)
            except RankFailure:
                self.reform()
                continue
            num_steps += 1
            if (victim := victims.pop(num_steps, None)) is not None:
                os.kill(self.gang.processes[victim].pid, signal.SIGKILL)
        assert not victims, "every rank was killed while there was work"
        assert self.engine.stats().num_blocks_used == 0
        self.engine.check_integrity()
        return {name: tokens_of(found) for name, found in outputs.items()}


def gang_config(reference: Reference, **changes: Any) -> WorkerConfig:
    values: dict[str, Any] = {
        "rank": 0,
        "channel_address": "",
        "secret": "",
        "model": str(reference.directory),
        "dtype": Dtype.FLOAT32,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 64,
        "block_size": 4,
        "kv_cache_memory_bytes": 2**20,
        "collective_timeout_s": 20.0,
    }
    return WorkerConfig(**values | changes)


@contextmanager
def gang_engine(reference: Reference, **changes: Any) -> Iterator[ForkedGangEngine]:
    config = gang_config(reference, **changes)
    served = ForkedGangEngine(ProcessGang(config), config)
    try:
        yield served
    finally:
        served.gang.close()


def make_request(name: str, prompt: list[int], **options: Any) -> Request:
    values: dict[str, Any] = {"max_tokens": NUM_NEW, "temperature": 0.0}
    return Request(name, list(prompt), len(prompt), SamplingParams(**values | options))


def tokens_of(outputs: list[Output]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]
